/* Where things are in the machine's memory: what microvm.c and guest.S agree on. From 1 MiB each vCPU has a
 * slice: a page whose first word counts its steps, then the pages it writes. The last eighth of the memory is
 * never touched.
 *
 * The mailbox (docs/mailbox.md) is vCPU 0's: the VMM puts its name and token where they belong in the frame, and
 * the guest makes it a frame. */
#pragma once

#define GPA_PML4 0x1000
#define GPA_PDPT 0x2000
#define GPA_PD 0x3000      /* 16 pages: identity, 2 MiB pages, 16 GiB */
#define GPA_DEVICE 0x1e000 /* a word that the VMM changes whenever it saves device state */
#define GPA_PROGRAM 0x20000
#define GPA_STACKS 0x30000  /* a page for each vCPU */
#define GPA_MAILBOX 0x50000 /* touched only when there is one */
#define GPA_HOOK 0x51000    /* the address of what is called before each step, with HAS_DEVICES */
#define GPA_SLICES 0x100000
#define MAX_MEMORY (16ull << 30)
#define MAX_VCPUS 16
#define SERIAL_PORT 0x3f8
#define REPORT_STEPS 0x10000 /* a line "ok VCPU STEPS" each that many steps */
#define HAS_MAILBOX 0x100    /* in rdi */
#define HAS_DEVICES 0x200    /* in rdi: Firecracker only; a mailbox is theirs then */
#define IS_SILENT 0x400      /* in rdi: the mailbox's page gets no ACK */
#define MAILBOX_NAME 24      /* within the page, all of these */
#define MAILBOX_CRC 224
#define MAILBOX_FLAGS 228
#define MAILBOX_WANTS_ACK 2
#define MAILBOX_ACK 232
#define MAILBOX_EPOCH 240
#define MAILBOX_SEQ 256
#define MAILBOX_LENGTH 260
#define MAILBOX_PAYLOAD 264
#define MAILBOX_MAX 3832
