/* QEMU plugin (API 1): instructions executed, by address, and between marks.
 *
 * Debian's QEMU takes plugins but ships no header, so what is used of its interface is declared here.
 * Arguments, numbers hexadecimal: out=FILE, mark=ADDRESS and apart=START-END (both repeated). Output: lines "i ADDRESS COUNT" and
 * "m INDEX TOTAL APART": when the function at the INDEX-th mark was entered, TOTAL instructions had been executed, APART of them in
 * the ranges. The last line is "t TOTAL APART". */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct qemu_info qemu_info_t;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), enum qemu_plugin_cb_flags, void *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, enum qemu_plugin_op, void *, uint64_t);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);

EXPORT int qemu_plugin_version = 1;

enum { BUCKETS = 1 << 16, MARKS = 1024, RANGES = 256 };
typedef struct node {
    struct node *next;
    uint64_t address, count;
} node;
static node *table[BUCKETS];
static uint64_t marks[MARKS], ranges[RANGES][2], total, apart;
static size_t n_marks, n_ranges;
static FILE *out;

static node *find(uint64_t address) {
    node **bucket = &table[(address >> 1) % BUCKETS];
    for (node *n = *bucket; n; n = n->next)
        if (n->address == address) return n;
    node *n = calloc(1, sizeof *n);
    if (!n) abort();
    n->address = address, n->next = *bucket, *bucket = n;
    return n;
}

static void entered(unsigned cpu, void *index) {
    (void)cpu;
    fprintf(out, "m %zu %llu %llu\n", (size_t)index, (unsigned long long)total, (unsigned long long)apart);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    const size_t n = qemu_plugin_tb_n_insns(tb);
    for (size_t i = 0; i < n_marks; i++) /* a function's first instruction begins a block; callbacks come before inline counts */
        if (qemu_plugin_tb_vaddr(tb) == marks[i]) qemu_plugin_register_vcpu_tb_exec_cb(tb, entered, QEMU_PLUGIN_CB_NO_REGS, (void *)i);
    qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &total, n);
    for (size_t i = 0; i < n; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        const uint64_t address = qemu_plugin_insn_vaddr(insn);
        qemu_plugin_register_vcpu_insn_exec_inline(insn, QEMU_PLUGIN_INLINE_ADD_U64, &find(address)->count, 1);
        for (size_t r = 0; r < n_ranges; r++)
            if (address >= ranges[r][0] && address < ranges[r][1])
                qemu_plugin_register_vcpu_insn_exec_inline(insn, QEMU_PLUGIN_INLINE_ADD_U64, &apart, 1);
    }
}

static void ended(qemu_plugin_id_t id, void *unused) {
    (void)id, (void)unused;
    for (size_t i = 0; i < BUCKETS; i++)
        for (node *n = table[i]; n; n = n->next) fprintf(out, "i %llx %llu\n", (unsigned long long)n->address, (unsigned long long)n->count);
    fprintf(out, "t %llu %llu\n", (unsigned long long)total, (unsigned long long)apart);
    fclose(out);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) out = fopen(argv[i] + 4, "w");
        char *end;
        if (!strncmp(argv[i], "apart=", 6) && n_ranges < RANGES) {
            ranges[n_ranges][0] = strtoull(argv[i] + 6, &end, 16);
            ranges[n_ranges++][1] = strtoull(*end ? end + 1 : end, NULL, 16);
        }
        if (!strncmp(argv[i], "mark=", 5) && n_marks < MARKS) marks[n_marks++] = strtoull(argv[i] + 5, NULL, 16);
    }
    if (!out) return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
