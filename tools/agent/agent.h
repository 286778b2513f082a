/* The agent's own parts. One thread and one loop: whatever is started, ends or is said is an event of it, so that the list
 * of processes needs no lock and no child can end between its start and its entry in the list.
 *
 * Nothing in the loop waits but epoll_wait. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include "out.h"
#include "wire.h"

/* ---- main.c: the loop ---- */

struct watch {
	int fd; /* -1: none */
	bool armed;
	void (*ready)(struct watch *w, uint32_t events);
};
/* One event is taken at a time, so a handler may end any watch, its own too. */
void watch_arm(struct watch *w, uint32_t events);
void watch_disarm(struct watch *w);
/* And closes the descriptor. */
void watch_close(struct watch *w);

uint64_t now_ns(clockid_t clock);

/* A line on stderr: the console of a process 1. */
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#define MAILBOXES_MAX 16u

struct options {
	const char *unix_path, *exit_file;
	char *mailbox[MAILBOXES_MAX]; /* NAME[:TOKEN] */
	unsigned n_mailboxes;
	const char *on_mailbox, *ack_address;
	bool halt;    /* power off when the main command has ended */
	bool is_init; /* process 1 of a guest */
	bool vsock;
};
extern struct options options;

/* One more of them; what is too many is said, and left out. */
void option_mailbox(char *word);

/* ---- boot.c: process 1 ---- */

/* File systems, modules of /modules/order, the console; the kernel's command line into `options`. */
void boot(void);
/* The main command's code, in the file that was asked for: on the disk when it comes back. None while it runs. */
void exit_file_write(int code);
void exit_file_remove(void);
void power_off(void) __attribute__((noreturn));

/* ---- channel.c: where a host comes in ---- */

struct conn {
	struct watch w;
	const char *kind;
	bool port;    /* a virtio-serial port: stays when the host goes */
	bool hung;    /* nobody is at the other end of the port, or another already: it is waited for */
	bool gone;    /* to be freed when its handler is through */
	bool session; /* a HELLO came: nonce is its */
	uint8_t nonce[16];
	struct agent_decoder dec;
	struct agent_out out;
	struct conn *next;
};

/* Open what there is, and listen for what comes later. */
void channels_start(void);
/* After a restore: listeners are made anew and connections other than `keep` end, which are of another life. */
void channels_rebind(const struct conn *keep);

/* ---- conn.c: a connection ---- */

void conn_add(int fd, const char *kind, bool port);
void conn_send(struct conn *c, uint8_t type, uint32_t stream, const void *payload, size_t len);
/* So much is waiting that nothing that can wait should be added. */
bool conn_full(const struct conn *c);
void conn_close_others(const struct conn *keep);

/* ---- session.c: HELLO and what follows ---- */

void session_hello(struct conn *c, const struct agent_frame *f);

/* ---- process.c: commands ---- */

void process_exec(struct conn *c, const struct agent_frame *f);
/* STDIN, STDIN_END, SIGNAL, RESIZE, WINDOW_MORE. */
void process_frame(struct conn *c, const struct agent_frame *f);
/* All commands of a connection (any group), or of one group of it, lose it and get SIGHUP. */
void process_hangup(const struct conn *c, bool any, uint32_t group);
/* The connection has room again. */
void process_resume(const struct conn *c);
/* False: that is no process of ours. The reaper has its status. */
bool process_ended(pid_t pid, int status);
/* The main command: once in the life of the guest. argv of the agent's own command line, or a request. */
void process_main(struct conn *c, const struct agent_frame *f);
void process_main_argv(char **argv);

/* When process_tick() has something to do, -1: never. */
int process_due_ms(void);
void process_tick(void);

/* ---- console.c: what a main command says that no host takes ---- */

/* False: what was put before has not gone yet. process_resume(NULL) is called when it has. */
bool console_room(void);
/* At most AGENT_PAYLOAD_MAX bytes, when there is room. */
void console_put(const void *bytes, size_t n);

/* ---- mailboxes.c ---- */

void mailboxes_start(void);
/* Look into all of them; and when to look again at the latest, -1: never. */
void mailboxes_look(void);
int mailboxes_due_ms(void);
/* False: that is no process of theirs. */
bool mailboxes_ended(pid_t pid, int status);

/* ---- halt.c ---- */

/* Power off when the host has what it was told of that stream on that connection (NULL: it was told nothing). */
void halt_when_heard(const struct conn *c, uint32_t stream);
/* It wants nothing more of a group of streams, or of any. */
void halt_heard(const struct conn *c, bool any, uint32_t which);

/* ---- reaper.c ---- */

void reaper_start(void);
