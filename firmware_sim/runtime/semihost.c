/* Input, output and exit by Arm semihosting, as QEMU and debuggers offer it. Files: in.bin and out.bin of the host's working folder. */
#include "edgekit.h"

enum { OPEN = 0x01, WRITE0 = 0x04, WRITE = 0x05, READ = 0x06, EXIT = 0x20 };
enum { READ_BINARY = 1, WRITE_BINARY = 5 };

static int call(int operation, const void *arguments) {
    register int r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = arguments;
    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static int open(const char *name, uint32_t length, uint32_t mode) {
    const uint32_t arguments[3] = {(uint32_t)name, mode, length};
    const int handle = call(OPEN, arguments);
    if (handle < 0) ek_exit(EK_EXIT_HOST);
    return handle;
}

int ek_input(void *destination, uint32_t bytes) {
    static int handle = -1;
    if (handle < 0) handle = open("in.bin", 6, READ_BINARY);
    const uint32_t arguments[3] = {(uint32_t)handle, (uint32_t)destination, bytes};
    const uint32_t missing = (uint32_t)call(READ, arguments);
    if (missing == 0) return 1;
    if (missing == bytes) return 0;
    ek_log_number("input_missing", missing);
    ek_exit(missing < bytes ? EK_EXIT_INPUT : EK_EXIT_HOST);
}

void ek_output(const void *source, uint32_t bytes) {
    static int handle = -1;
    if (handle < 0) handle = open("out.bin", 7, WRITE_BINARY);
    const uint32_t arguments[3] = {(uint32_t)handle, (uint32_t)source, bytes};
    if (call(WRITE, arguments)) ek_exit(EK_EXIT_HOST);
}

void ek_log(const char *text) { call(WRITE0, text); }

_Noreturn void ek_exit(int code) {
    const uint32_t arguments[2] = {0x20026u, (uint32_t)code}; /* ADP_Stopped_ApplicationExit */
    call(EXIT, arguments);
    for (;;) {
    }
}
