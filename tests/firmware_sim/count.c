/* Test firmware: two functions whose instructions are known. */
#include "edgekit.h"

__attribute__((noinline)) void loop(uint32_t n) { /* 2 instructions a turn, a nop and the return */
    __asm volatile("nop\n1: subs r0, #1\n bne 1b\n" : "+r"(n) : : "cc");
}
__attribute__((noinline)) void caller(uint32_t n) {
    loop(n);
    loop(n);
    __asm volatile("");
}
int ek_main(void) {
    uint32_t n;
    volatile uint64_t a = 1000, b = 7;
    while (ek_input(&n, 4)) {
        loop(n);
        caller(n);
    }
    return (int)(a / b) - 142;
}
