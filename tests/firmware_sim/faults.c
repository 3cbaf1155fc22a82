/* Test firmware: the first byte of the input says which fault to provoke. */
#include "edgekit.h"

static uint8_t arena[ARENA] EK_ARENA;
static const uint8_t weights[64] EK_WEIGHTS = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
static const uint32_t even = 0;
static volatile uintptr_t target;

__attribute__((noinline)) static int deeper(int n) {
    volatile uint8_t frame[200];
    frame[n % 200] = (uint8_t)n;
    return n == 0 ? 0 : deeper(n - 1) + frame[n % 200];
}

int ek_main(void) {
    const ek_segment segments[] = {{weights, sizeof weights, WEIGHTS_CRC}};
    volatile int zero = 0;
    uint8_t mode = 0, four[4];
    ek_check_weights(segments, 1);
    ek_input(&mode, 1);
    switch (mode) {
    case 'a': ek_check_arena(arena, sizeof arena, sizeof arena + 1); break;
    case 'A': ek_check_arena(arena + 1, sizeof arena - 1, 16); break;
    case 'u': __asm volatile(".short 0xde00"); break;
    case 'd': return 5 / zero;
    case 'j': target = (uintptr_t)&even & ~(uintptr_t)1; ((void (*)(void))target)(); break;
    case 'm': *(volatile uint32_t *)NOWHERE = 1; break;
    case 'f': *(volatile uint8_t *)(uintptr_t)weights = 99; break;
    case 's': return deeper(100000) & 1;
    case 'w': ek_watchdog_start(100000); for (;;) {} break;
    case 'W': ek_watchdog_start(100000);
        for (volatile int i = 0; i < 100; i++) {
            ek_watchdog_feed();
            for (volatile int j = 0; j < 100; j++) {}
        }
        return 0;
    case 'l': for (;;) {} break;
    case 'i': ek_input(four, 4); break;
    case 'c': return 42;
    default: return 0;
    }
    return 1;
}
