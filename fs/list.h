/* Intrusive doubly linked list with a head. No locks: the owner's. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

struct ffs_list {
	struct ffs_list *next, *prev;
};

#define ffs_container(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))

static inline void ffs_list_init(struct ffs_list *head)
{
	head->next = head->prev = head;
}
static inline bool ffs_list_empty(const struct ffs_list *head)
{
	return head->next == head;
}
/* False for an element that was never added or was removed. */
static inline bool ffs_list_linked(const struct ffs_list *e)
{
	return e->next && e->next != e;
}
static inline void ffs_list_add(struct ffs_list *head, struct ffs_list *e)
{
	e->prev = head->prev;
	e->next = head;
	head->prev->next = e;
	head->prev = e;
}
static inline void ffs_list_del(struct ffs_list *e)
{
	if (!e->next)
		return;
	e->prev->next = e->next;
	e->next->prev = e->prev;
	e->next = e->prev = NULL;
}
/* All of `from` to the empty list `to`. */
static inline void ffs_list_move(struct ffs_list *to, struct ffs_list *from)
{
	ffs_list_init(to);
	if (ffs_list_empty(from))
		return;
	*to = *from;
	to->next->prev = to;
	to->prev->next = to;
	ffs_list_init(from);
}
