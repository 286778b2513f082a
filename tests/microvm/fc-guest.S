/* The same guest (guest.S) as an ELF64 kernel for Firecracker: the 64-bit Linux boot protocol, entered in ring 0 with
 * rsi = boot_params and the first GiB mapped.
 *
 * The command line begins with two decimal numbers, in MiB: where the slice is, and its size; then comes "mailbox" when
 * there is one, of the name config and the token s3cret, or "devices" for those that fc-virtio.c drives, or "vsock-mailbox" when its
 * vsock is for the ACKs of its mailbox, or "silent" for a mailbox without any, or "f" and
 * the size of the memory in MiB, all of which behind the slice is then touched once. It makes page tables of its own for 16 GiB, and goes to ring 3 with IOPL 3: a hypervisor without hardware support emulates ring 0 instruction
 * by instruction. */
#include "machine.h"

#define CMD_LINE_PTR 0x228		/* struct boot_params: hdr.cmd_line_ptr */
#define TABLES 0x800000			/* PML4, PDPT, 16 page directories */

	.text
	.globl _start
_start:	lea	stack_end(%rip), %rsp
	mov	CMD_LINE_PTR(%rsi), %esi
	call	number
	mov	%rax, %r15
	call	number
	mov	%rax, %r14
	xor	%r10d, %r10d
	cmpb	$'m', (%rsi)
	je	14f
	cmpb	$'s', (%rsi)
	jne	12f
	mov	$IS_SILENT, %r10d
	jmp	14f
12:	cmpb	$'v', (%rsi)
	jne	7f
	mov	$HAS_DEVICES, %r10d
	movq	$devices, GPA_HOOK
	movb	$1, by_vsock
14:	or	$HAS_MAILBOX, %r10d
	movabs	$0x73006769666e6f63, %rax	/* "config\0s3cret" */
	mov	%rax, GPA_MAILBOX + MAILBOX_NAME
	movabs	$0x7465726333, %rax
	mov	%rax, GPA_MAILBOX + MAILBOX_NAME + 8
7:	cmpb	$'d', (%rsi)
	jne	8f
	or	$HAS_DEVICES, %r10d
	movq	$devices, GPA_HOOK
8:	xor	%r12d, %r12d
	cmpb	$'f', (%rsi)
	jne	9f
	inc	%rsi
	call	number
	mov	%rax, %r12
	lea	1024(%rax), %rcx		/* a quarter of it lies above the devices */
	cmp	$3072, %rax
	cmova	%rcx, %r12
	shl	$20, %r12
9:	mov	$TABLES, %edi			/* the VM may have been reset: all entries are written */
	xor	%eax, %eax
	mov	$(2 * 512), %ecx
	rep stosq
	movq	$(TABLES + 0x1000 + 7), TABLES
	mov	$TABLES + 0x1000, %edi
	mov	$(TABLES + 0x2000 + 7), %eax
	mov	$16, %ecx
1:	stosq
	add	$4096, %rax
	loop	1b
	mov	$TABLES + 0x2000, %edi
	mov	$0xe7, %eax			/* present, writable, user, accessed, dirty, 2 MiB */
	mov	$(16 * 512), %ecx
2:	stosq
	add	$0x200000, %rax
	loop	2b
	mov	$TABLES, %eax
	mov	%rax, %cr3
	lgdt	gdt_pointer(%rip)
	shl	$8, %r14			/* MiB -> pages, one of which counts the steps */
	dec	%r14
	shl	$20, %r15
	xor	%ebx, %ebx
3:	lea	-1(%r14), %rax
	cmp	%rax, %rbx
	jae	4f
	lea	1(%rbx,%rbx), %rbx
	jmp	3b
4:	movabs	$0x9e3779b97f4a7c15, %rbp
	movabs	$0x123456789abcdef, %r9
	xor	%r8d, %r8d
	xor	%r11d, %r11d
	xor	%r13d, %r13d
	lea	'0'(%r10), %edi
	lea	stack_end(%rip), %rdx
	lea	fill(%rip), %rcx
	push	$0x1b				/* ss */
	push	%rdx
	push	$0x3002				/* rflags: IOPL 3 */
	push	$0x23				/* cs */
	push	%rcx
	iretq

/* rax: the number at rsi, which is moved behind it and the blank after it */
number:	xor	%eax, %eax
5:	movzbl	(%rsi), %ecx
	inc	%rsi
	sub	$'0', %ecx
	cmp	$9, %ecx
	ja	6f
	lea	(%rax,%rax,4), %rax
	lea	(%rcx,%rax,2), %rax
	jmp	5b
6:	ret

/* Touch what is behind the slice, up to r12, but for the fourth GiB. */
fill:	lea	1(%r14), %rdx
	shl	$12, %rdx
	add	%r15, %rdx
	mov	$0xc0000000, %eax
	mov	$0x40000000, %ecx
10:	cmp	%r12, %rdx
	jae	guest_begin
	cmp	%rax, %rdx
	jne	11f
	add	%rcx, %rdx
11:	movb	$1, (%rdx)
	add	$4096, %rdx
	jmp	10b

/* From guest.S, which keeps its registers. */
devices:
	push	%rdi
	push	%r8
	push	%r9
	push	%r11
	sub	$8, %rsp
	call	virtio_poll
	add	$8, %rsp
	pop	%r11
	pop	%r9
	pop	%r8
	pop	%rdi
	ret

	.balign	8
gdt:	.quad	0
	.quad	0x00af9b000000ffff		/* 0x08: ring 0, 64-bit code */
	.quad	0x00cf93000000ffff		/* 0x10: ring 0, data */
	.quad	0x00cff3000000ffff		/* 0x18: ring 3, data */
	.quad	0x00affb000000ffff		/* 0x20: ring 3, 64-bit code */
gdt_end:
gdt_pointer:
	.word	gdt_end - gdt - 1
	.quad	gdt

	.bss
	.balign	4096
	.skip	8192
stack_end:

#include "guest.S"
