/* What is checked before the first inference. */
#include "internal.h"

EK_NOINLINE uint32_t ek_crc32(const void *data, uint32_t bytes) {
    /* one nibble a step: 64 bytes of table */
    static const uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
                                       0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    uint32_t crc = ~0u;
    for (const uint8_t *p = data, *end = p + bytes; p < end; p++) {
        crc = table[(crc ^ *p) & 15u] ^ (crc >> 4);
        crc = table[(crc ^ (*p >> 4)) & 15u] ^ (crc >> 4);
    }
    return ~crc;
}

void ek_check_weights(const ek_segment *segments, uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
        if (ek_crc32(segments[i].data, segments[i].bytes) != segments[i].crc) {
            ek_log_number("segment", i);
            ek_exit(EK_EXIT_WEIGHTS);
        }
}

void ek_check_arena(const void *arena, uint32_t have, uint32_t need) {
    if (have >= need && ((uintptr_t)arena & 15u) == 0) return;
    ek_log_number("arena_have", have);
    ek_log_number("arena_need", need);
    ek_exit(EK_EXIT_ARENA);
}
