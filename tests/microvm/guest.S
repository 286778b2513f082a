/* The guest: a program that judges its own memory. Every vCPU runs it, each in its own slice.
 *
 * What it expects is in registers and nowhere else. In sweep g (1, 2, …) it visits every page of its slice
 * once, ascending when g is even, scattered when g is odd (a bijection of the place: no table). Before it
 * writes a page it checks that sweep g-1 is in it; after it, a random page: sweep g if its turn was before, g-1
 * if not. A page of sweep g holds hash(page) * g in three words. So one of another instant is found in a sweep.
 *
 * On entry: r15 slice, r14 its pages, rbx the power of two not below them, minus 1, rbp key (odd), r9 seed, r11
 * idle loops a step, rdi '0' + vCPU (and HAS_MAILBOX, HAS_DEVICES, IS_SILENT), rsp stack; r8, r13 zero. Then: r8 steps, r12 place, r13 g,
 * in xmm0 too, xmm1 the epoch that the mailbox had last.
 *
 * With a mailbox it looks at seq before every step, and says what it finds there: "mail EPOCH PAYLOAD", with
 * "again" in place of the epoch when it is the last one's, or "mail damaged". It acknowledges in the page what wants
 * that, unless it is silent. Then the mailbox is free for the next. A fork's child has its payload there when it wakes up. */
#include "machine.h"

/* rax: place -> page of this sweep; may be behind the last one, as the bijection is of a power of two */
.macro page_of_place
	testb	$1, %r13b
	jz	1f
	imul	$0x1e3779b1, %rax, %rax
	and	%rbx, %rax
	mov	%rax, %rcx
	shr	$5, %rcx
	xor	%rcx, %rax
1:
.endm

/* page rax must be of sweep rdx; then: rsi its address, r10 its middle word's, rcx the hash, rdx the value */
.macro check_page
	lea	1(%rax), %rsi
	mov	%rsi, %rcx
	imul	%rbp, %rcx
	or	$1, %rcx
	imul	%rcx, %rdx
	shl	$12, %rsi
	add	%r15, %rsi
	and	$63, %eax
	shl	$6, %eax
	lea	8(%rsi,%rax), %r10
	cmp	%rdx, (%rsi)
	jne	mismatch
	cmp	%rdx, (%r10)
	jne	mismatch
	cmp	%rdx, 4088(%rsi)
	jne	mismatch
.endm

.macro put char
	mov	$\char, %al
	out	%al, %dx
.endm

	.section .rodata
	.globl guest_begin, guest_end
guest_begin:
	test	$HAS_MAILBOX, %edi
	jz	sweep
	pxor	%xmm1, %xmm1
	lea	magic(%rip), %rsi	/* its first byte is written last: from then on it is a frame */
	mov	$(magic_end - magic), %ecx
9:	mov	-1(%rsi,%rcx), %al
	dec	%al
	mov	%al, GPA_MAILBOX - 1(%rcx)
	dec	%ecx
	jnz	9b
	test	$HAS_DEVICES, %edi	/* then what is called before each step looks into it */
	jz	sweep
	and	$~HAS_MAILBOX, %edi
sweep:	inc	%r13
	movq	%r13, %xmm0
	xor	%r12d, %r12d
step:	test	$HAS_DEVICES, %edi
	jz	7f
	call	*GPA_HOOK
7:	test	$HAS_MAILBOX, %edi
	jz	1f
	cmpl	$0, GPA_MAILBOX + MAILBOX_SEQ
	je	1f
	call	mail
1:	mov	%r12, %rax
	page_of_place
	cmp	%r14, %rax
	jae	next
	lea	-1(%r13), %rdx
	check_page
	add	%rcx, %rdx
	mov	%rdx, (%rsi)
	mov	%rdx, (%r10)
	mov	%rdx, 4088(%rsi)
	imul	$0x5851f42d, %r9, %r9	/* the high bits of a linear congruence */
	inc	%r9
	mov	%r9, %rax
	shr	$33, %rax
	and	%rbx, %rax
	mov	%r13, %rdx
	cmp	%r12, %rax
	jbe	2f
	dec	%rdx
2:	page_of_place
	cmp	%r14, %rax
	jae	3f
	check_page
3:	mov	%r15, %rsi
	cmp	%r8, (%rsi)
	jne	mismatch
	inc	%r8
	mov	%r8, (%rsi)
	test	$(REPORT_STEPS - 1), %r8d
	jnz	4f
	call	report
4:	mov	%r11, %rcx
5:	test	%rcx, %rcx
	jz	next
	dec	%rcx
	pause
	jmp	5b
next:	inc	%r12
	cmp	%rbx, %r12
	jbe	step
	jmp	sweep

report:	movq	%xmm0, %rsi		/* shown as the address where it is wrong */
	cmp	%rsi, %r13
	jne	mismatch
	mov	$SERIAL_PORT, %edx
	put	'o'
	put	'k'
	mov	%r8, %rsi
tail:	put	' '			/* " VCPU RSI\n" */
	mov	%edi, %eax
	out	%al, %dx
	put	' '
	mov	$60, %ecx
6:	mov	%rsi, %rax
	shr	%cl, %rax
	and	$15, %eax
	add	$'0', %eax
	cmp	$'9', %eax
	jbe	7f
	add	$('a' - '9' - 1), %eax
7:	out	%al, %dx
	sub	$4, %ecx
	jns	6b
	put	'\n'
	ret

/* The CRC of rcx bytes at rsi, continued in eax. */
crc:	crc32b	(%rsi), %eax
	inc	%rsi
	dec	%ecx
	jnz	crc
	ret

mail:	mov	$SERIAL_PORT, %edx
	.irp	char, 'm, 'a, 'i, 'l
	put	\char
	.endr
	put	' '
	mov	GPA_MAILBOX + MAILBOX_LENGTH, %r10d
	lea	-1(%r10), %ecx
	cmp	$MAILBOX_MAX, %ecx
	jae	damaged
	mov	$-1, %eax
	mov	$GPA_MAILBOX + MAILBOX_FLAGS, %esi
	mov	$(MAILBOX_SEQ - MAILBOX_FLAGS), %ecx
	call	crc
	mov	$GPA_MAILBOX + MAILBOX_LENGTH, %esi
	lea	(MAILBOX_PAYLOAD - MAILBOX_LENGTH)(%r10), %ecx
	call	crc
	not	%eax
	cmp	%eax, GPA_MAILBOX + MAILBOX_CRC
	jne	damaged
	movdqu	GPA_MAILBOX + MAILBOX_EPOCH, %xmm2
	movdqa	%xmm2, %xmm3
	pcmpeqb	%xmm1, %xmm3
	movdqa	%xmm2, %xmm1
	pmovmskb %xmm3, %eax
	cmp	$0xffff, %eax
	je	again
	mov	$GPA_MAILBOX + MAILBOX_EPOCH, %esi
	mov	$16, %ecx
1:	mov	(%rsi), %al
	shr	$4, %al
	call	digit
	mov	(%rsi), %al
	and	$15, %al
	call	digit
	inc	%rsi
	dec	%ecx
	jnz	1b
2:	put	' '
	mov	$GPA_MAILBOX + MAILBOX_PAYLOAD, %esi
3:	mov	(%rsi), %al
	out	%al, %dx
	inc	%rsi
	dec	%r10d
	jnz	3b
	put	'\n'
	testb	$MAILBOX_WANTS_ACK, GPA_MAILBOX + MAILBOX_FLAGS
	jz	5f
	test	$IS_SILENT, %edi
	jnz	5f
	mov	$-1, %eax		/* of the epoch and the name */
	mov	$GPA_MAILBOX + MAILBOX_EPOCH, %esi
	mov	$16, %ecx
	call	crc
	mov	$GPA_MAILBOX + MAILBOX_NAME, %esi
3:	mov	$1, %ecx
	call	crc
	cmpb	$0, (%rsi)
	jne	3b
	not	%eax
	mov	%eax, GPA_MAILBOX + MAILBOX_ACK + 4
	movl	$1, GPA_MAILBOX + MAILBOX_ACK
	jmp	5f
4:	put	'\n'
5:	movl	$0, GPA_MAILBOX + MAILBOX_SEQ
	ret
again:	.irp	char, 'a, 'g, 'a, 'i, 'n
	put	\char
	.endr
	jmp	2b
damaged:
	.irp	char, 'd, 'a, 'm, 'a, 'g, 'e, 'd
	put	\char
	.endr
	jmp	4b
digit:	add	$'0', %al
	cmp	$'9', %al
	jbe	5f
	add	$('a' - '9' - 1), %al
5:	out	%al, %dx
	ret

mismatch:
	mov	$SERIAL_PORT, %edx
	.irp	char, 'M, 'I, 'S, 'M, 'A, 'T, 'C, 'H
	put	\char
	.endr
	call	tail
8:	pause				/* the VMM stops the vCPU that said so */
	jmp	8b

/* "HYPEMAN_FORK_MAILBOX_V1" and its NUL, each byte one more than it is: no copy of the program is a frame */
magic:	.ascii	"IZQFNBO`GPSL`NBJMCPY`W2\001"
magic_end:
guest_end:
	.section .note.GNU-stack,"",@progbits
