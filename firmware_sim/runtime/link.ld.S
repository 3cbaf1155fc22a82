/* Linker script for every board. Run through the C preprocessor with
 *     -P -undef -DFLASH_BASE=.. -DFLASH_SIZE=.. -DRAM_BASE=.. -DRAM_SIZE=.. -DSTACK_SIZE=..
 * The stack is at the bottom of RAM: running over its end leaves RAM and faults instead of writing into data. */
MEMORY {
    FLASH (rx) : ORIGIN = FLASH_BASE, LENGTH = FLASH_SIZE
    RAM (rwx) : ORIGIN = RAM_BASE, LENGTH = RAM_SIZE
}
ENTRY(Reset_Handler)
SECTIONS {
    .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) . = ALIGN(4); } > FLASH
    .ARM.exidx : { *(.ARM.exidx*) } > FLASH
    /* kernels read rows of weights in whole words */
    .weights : ALIGN(16) { __weights_start = .; *(.weights*) __weights_end = .; . = ALIGN(4); } > FLASH
    .stack (NOLOAD) : { . = ALIGN(8); __stack_limit = .; . += STACK_SIZE; . = ALIGN(8); __stack_top = .; } > RAM
    .data : { . = ALIGN(4); __data_start = .; *(.data*) . = ALIGN(4); __data_end = .; } > RAM AT> FLASH
    __data_load = LOADADDR(.data);
    .bss (NOLOAD) : { . = ALIGN(4); __bss_start = .; *(.bss*) *(COMMON) . = ALIGN(4); __bss_end = .; } > RAM
    .arena (NOLOAD) : { . = ALIGN(16); *(.arena*) } > RAM
    __flash_start = ORIGIN(FLASH);
    __flash_end = ORIGIN(FLASH) + LENGTH(FLASH);
    __ram_start = ORIGIN(RAM);
    /DISCARD/ : { *(.comment) }
}
