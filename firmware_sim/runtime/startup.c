/* Reset, fault handlers, guards: one file for Armv6-M to Armv8.1-M. */
#include "edgekit.h"

#define REG(address) (*(volatile uint32_t *)(address))
#define CPACR 0xE000ED88u
#define CCR 0xE000ED14u
#define SHCSR 0xE000ED24u
#define CFSR 0xE000ED28u
#define MMFAR 0xE000ED34u
#define MPU_TYPE 0xE000ED90u
#define MPU(offset) REG(MPU_TYPE + (offset))
#define PAINT 0xC0FFEE11u
#define BARRIER() __asm volatile("dsb\n isb" ::: "memory")

extern uint32_t __data_load[], __data_start[], __data_end[], __bss_start[], __bss_end[], __stack_limit[], __stack_top[];
extern uint8_t __flash_start[], __flash_end[], __ram_start[];

void Reset_Handler(void);
void Fault_Handler(void);

static void unhandled(void) { ek_exit(EK_EXIT_INTERRUPT); }

void NMI_Handler(void);
__attribute__((weak)) void NMI_Handler(void) { ek_exit(EK_EXIT_WATCHDOG); } /* nothing else raises it on these boards */

#ifdef EK_TICKS
void SysTick_Handler(void);
#else
__attribute__((weak)) void SysTick_Handler(void) { unhandled(); } /* an application's own replaces it by name */
#endif

__attribute__((section(".vectors"), used)) static void *const vectors[16 + 64] = {
    __stack_top,        (void *)Reset_Handler, (void *)NMI_Handler, (void *)Fault_Handler, (void *)Fault_Handler,
    (void *)Fault_Handler, (void *)Fault_Handler, (void *)Fault_Handler, 0, 0,
    0,                  (void *)unhandled,     (void *)unhandled,   0,                     (void *)unhandled,
    (void *)SysTick_Handler, [16 ... 79] = (void *)unhandled};

/* Which sentence a fault deserves: a stack that ran over shows in the stack pointer, the limit flag, or the guard's address. */
static int fault_code(uint32_t exception, const uint32_t *sp) {
    int code = 0x70 + (int)(exception & 7u);
    if (sp < __stack_limit) code = EK_EXIT_STACK;
#if !defined(__ARM_ARCH_6M__)
    const uint32_t cfsr = REG(CFSR);
    if (cfsr & (1u << 20)) code = EK_EXIT_STACK; /* STKOF, Armv8-M */
    if (cfsr & (1u << 7)) {                      /* MMARVALID */
        const uint32_t at = REG(MMFAR);
        if (at >= (uint32_t)__flash_start && at < (uint32_t)__flash_end) code = EK_EXIT_FLASH_WRITE;
        if (at < (uint32_t)__ram_start && at >= (uint32_t)__ram_start - (1u << 16)) code = EK_EXIT_STACK;
    }
#endif
    return code;
}

__attribute__((used, noinline)) static void fault(const uint32_t *sp) {
    uint32_t exception;
    __asm volatile("mrs %0, ipsr" : "=r"(exception));
    const int code = fault_code(exception, sp);
#if !defined(__ARM_ARCH_6M__)
    ek_log_number("cfsr", REG(CFSR));
    ek_log_number("address", (REG(CFSR) & (1u << 7)) ? REG(MMFAR) : REG(MMFAR + 4));
#endif
    if (sp >= __stack_limit && sp + 8 <= __stack_top) ek_log_number("pc", sp[6]);
    ek_exit(code);
}

/* The stack may be unusable: take the address of the frame and start again at its top. */
__attribute__((naked)) void Fault_Handler(void) {
#if __ARM_ARCH >= 8
    __asm volatile("movs r0, #0\n msr msplim, r0\n");
#endif
    __asm volatile("mrs r0, msp\n ldr r1, =__stack_top\n mov sp, r1\n ldr r1, =fault\n bx r1\n .ltorg\n");
}

#if defined(__ARM_ARCH_7M__) || defined(__ARM_ARCH_7EM__)
/* Two regions: nothing below RAM (some boards drop accesses to nothing in silence), and flash is for reading. */
static void guard(void) {
    if (!(MPU(0) & 0xff00u)) return;
    uint32_t bits = 5;
    while ((2u << bits) < (uint32_t)(__flash_end - __flash_start)) bits++;
    MPU(0x08) = 0, MPU(0x0c) = (uint32_t)__ram_start - (1u << 24), MPU(0x10) = (1u << 28) | (23u << 1) | 1u;
    MPU(0x08) = 1, MPU(0x0c) = (uint32_t)__flash_start, MPU(0x10) = (6u << 24) | (bits << 1) | 1u;
    MPU(0x04) = 5; /* on, with the default map for the rest */
    BARRIER();
}
#elif __ARM_ARCH >= 8
/* MSPLIM guards the stack; one region makes flash read-only. */
static void guard(void) {
    __asm volatile("msr msplim, %0" ::"r"(__stack_limit));
    if (!(MPU(0) & 0xff00u)) return;
    MPU(0x30) = 0xffu; /* attribute 0: normal memory */
    MPU(0x08) = 0, MPU(0x0c) = (uint32_t)__flash_start | (3u << 1), MPU(0x10) = ((uint32_t)__flash_end - 32u) | 1u;
    MPU(0x04) = 5;
    BARRIER();
}
#else
static void guard(void) {}
#endif

uint32_t ek_stack_used(void) {
    const uint32_t *p = __stack_limit;
    while (p < __stack_top && *p == PAINT) p++;
    return (uint32_t)((const char *)__stack_top - (const char *)p);
}

void ek_log_number(const char *name, uint32_t value) {
    char digits[11];
    int i = 10;
    digits[i] = 0;
    do {
        digits[--i] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    ek_log("ek: ");
    ek_log(name);
    ek_log("=");
    ek_log(digits + i);
    ek_log("\n");
}

#ifdef EK_WATCHDOG_BASE
void ek_watchdog_start(uint32_t ticks) {
    REG(EK_WATCHDOG_BASE + 0xc00u) = 0x1ACCE551u; /* unlock */
    REG(EK_WATCHDOG_BASE) = ticks;
    REG(EK_WATCHDOG_BASE + 8u) = 3u; /* interrupt (NMI), then reset */
}
void ek_watchdog_feed(void) { REG(EK_WATCHDOG_BASE + 12u) = 1u; }
#else
void ek_watchdog_start(uint32_t ticks) { (void)ticks; }
void ek_watchdog_feed(void) {}
#endif

#ifdef EK_TICKS
/* Instructions by the emulator's virtual time, where its plugin is not to be had: SysTick counts down 24 bits, its wraps are counted. */
static volatile uint32_t wraps;
void SysTick_Handler(void) { wraps++; }
static void start_ticks(void) {
    REG(0xE000E014u) = 0xffffffu;
    REG(0xE000E018u) = 0;
    REG(0xE000E010u) = 7u;
}
static void log_ticks(void) {
    uint32_t high, low;
    do {
        high = wraps;
        low = 0xffffffu - REG(0xE000E018u);
    } while (high != wraps);
    ek_log_number("ticks_high", high);
    ek_log_number("ticks_low", low);
}
#else
static void start_ticks(void) {}
static void log_ticks(void) {}
#endif

__attribute__((used, noinline)) static void start(void) {
    for (uint32_t *to = __data_start, *from = __data_load; to < __data_end;) *to++ = *from++;
    for (uint32_t *to = __bss_start; to < __bss_end;) *to++ = 0;
#if !defined(__ARM_ARCH_6M__)
    REG(SHCSR) |= 7u << 16; /* faults of their own for memory, bus and usage */
    REG(CCR) |= 1u << 4;    /* dividing by zero faults */
#endif
#if defined(__ARM_FEATURE_MVE)
    REG(CCR) |= 1u << 19; /* low-overhead loops */
    BARRIER();
#endif
    guard();
    start_ticks();
    const int code = ek_main();
    log_ticks();
    ek_log_number("stack", ek_stack_used());
    ek_log_number("stack_size", (uint32_t)((const char *)__stack_top - (const char *)__stack_limit));
    ek_exit(code);
}

/* In assembly: the FPU must be on before any C (-O3 copies .data with it), and the stack is painted before it is used. */
__attribute__((naked, used)) void Reset_Handler(void) {
#if !defined(__ARM_ARCH_6M__)
    __asm volatile("ldr r0, =0xE000ED88\n ldr r1, [r0]\n orr r1, r1, #0xF00000\n str r1, [r0]\n dsb\n isb\n");
#endif
    __asm volatile(
        "ldr r0, =__stack_limit\n ldr r1, =__stack_top\n mov sp, r1\n ldr r2, =0xC0FFEE11\n"
        "1: str r2, [r0]\n adds r0, #4\n cmp r0, r1\n blo 1b\n ldr r0, =start\n bx r0\n .ltorg\n");
}
