/* A warm pool of a branch's children: `forkfs pool serve` and those who talk to it.
 *   cmd-pool.c      the command line
 *   pool-server.c   the loop: what is to be done, the end
 *   pool-children.c its children: begun, handed out, ended
 *   pool-client.c   a connection of somebody who asks
 *   pool-status.c   what it says of itself
 *   pool-work.c     what takes time, in threads: starting, handing out and ending a child
 *   pool-order.c    what is asked for with a child: payloads, a main command
 *   pool-book.c     the bookkeeping (pool-book.h)
 *   pool-guard.c    the process that ends the idle ones should the pool be killed
 *   pool-socket.c   the name at which the pool is found
 *   pool-ask.c      the other side: acquire, release, status, drain
 *
 * All state is the main thread's. A thread that works has one child, which nobody else touches meanwhile (but to kill it),
 * and what it was given; it reports through a list. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "pool-book.h"
#include "restore.h"

struct json_object;
struct ffs_command;
struct pool;
struct pool_client;

#define POOL_REQUEST_MAX (256u << 10)
#define POOL_CLIENTS                                                                                         \
	256u            /* connections; above FFS_POOL_WAITING, so that there is always room for a `status` */
#define POOL_STARTS 32u /* at the same time, at most */
#define POOL_TALK_NS 10000000000ull /* how long a client may take to say its request, or to take an answer */
#define POOL_WORK_NS 5000000000ull  /* for what is done to a child, also for who does not wait for one */
#define POOL_FULL_NS 200000000ull   /* until it is looked again whether there is a descriptor */
#define POOL_TIMEOUT_MAX_MS 86400000u

/* ---- pool-socket.c ---- */

struct pool_name {
	const char *path; /* borrowed */
	uint64_t dev, ino;
	int listener; /* -1: none */
};
/* Listen at `path`, 0600; one that a killed pool has left is taken over, -EADDRINUSE: somebody listens there. */
int pool_listen(struct pool_name *n, const char *path, struct ffs_error *err);
/* Close it and remove the name, if it still is that of the listener. */
void pool_unlisten(struct pool_name *n);
/* A connection to it; blocking. */
int pool_dial(const char *path, struct ffs_error *err);

/* ---- pool-guard.c ---- */

/* Its own process: the end of its connection is the end of the pool. Then all that it knows of is ended and removed. */
struct pool_guard {
	int fd, pidfd;
	pid_t pid;
};
int pool_guard_start(struct pool_guard *g, struct ffs_error *err);
/* False: it is not there any more, and has to be started and told anew. Nothing here waits. */
bool pool_guard_socket(struct pool_guard *g, const struct pool_name *n); /* to be removed */
bool pool_guard_child(struct pool_guard *g, const char *dir, int pidfd); /* pidfd -1: it is being started */
bool pool_guard_forget(struct pool_guard *g, const char *path);
void pool_guard_end(struct pool_guard *g);

/* ---- pool-order.c ---- */

enum { POOL_OPEN, POOL_BEGUN, POOL_CANCELLED };

struct pool_order {
	char **box; /* NAME=JSON each */
	unsigned n_boxes;
	bool ack, no_ack;
	unsigned ack_ms;
	uint8_t *main; /* of a request to the agent; NULL: none */
	size_t main_len;
	char *log; /* where its output goes; NULL: the guest's console */
	/* From OPEN it becomes BEGUN by who works for it: the child is not what it was; or CANCELLED by the main thread. */
	atomic_int state;
};
/* Of the object of an `acquire`. -EINVAL with a sentence. The caller frees it. */
int pool_order_read(struct json_object *o, struct pool_order **out, struct ffs_error *err);
void pool_order_free(struct pool_order *o);
/* The other direction, for who asks. */
struct json_object *pool_order_json(char *const *box, unsigned n, const char *ack, bool no_ack);
struct json_object *pool_order_words(char *const *word, unsigned n);
/* Make the fork that the order asks for and read it into `view`, whose pages, epoch and acknowledgements are then its own; the
 * fork itself is gone again. */
int pool_order_fork(
	struct ffs_restore *view, const struct pool_order *o, char epoch[40], struct ffs_error *err);
/* Start the main command in a child that runs; *pid is its process in the guest. */
int pool_order_main(const struct ffs_child *c, const struct pool_order *o, unsigned ready_s, uint64_t *pid,
	struct ffs_error *err);

/* ---- pool-work.c ---- */

/* What children of one branch have in common. A branch that is made in its place gets another. */
struct pool_template {
	atomic_uint refs;
	atomic_bool bad;      /* something of it failed: it is made anew before the next start */
	struct ffs_tree tree; /* its own: the next one may be of another daemon */
	struct ffs_restore r;
};

enum pool_job_kind { POOL_JOB_START, POOL_JOB_HAND, POOL_JOB_END };

struct pool_job {
	struct pool_job *next;
	struct pool *pool;
	bool threaded;
	pthread_t thread;
	enum pool_job_kind kind;
	unsigned at;
	int watch;                /* START: which of the pool's */
	struct pool_order *order; /* HAND: the client's, who waits for the end of this */
	uint64_t asked_ns;
	/* what came of it */
	int result;   /* HAND: -ECANCELED, -ESTALE: nothing was done */
	bool touched; /* HAND: the child is not what it was */
	struct ffs_error err;
	char *line; /* HAND: of the child */
};

struct pool_child {
	struct ffs_child vm;
	struct pool_template *of; /* NULL: not begun */
	bool runs;                /* it was resumed already */
	bool failed; /* pool->lock: its start has, and its thread ends it; nobody else may kill it */
	struct pool_client *client;      /* to whom it goes; HANDING */
	struct pool_client *released_by; /* is told when it is gone */
	char dir[100];                   /* as the guard knows it */
	struct pool_job job;             /* the one thing that is being done with it */
};

/* In a thread of its own; where none can be had, in this. Its end is told through pool->done. */
void pool_job_run(struct pool *p, struct pool_job job);
/* The template that is there, or a new one; by the main thread before it serves, or by a thread that starts a child. */
struct pool_template *pool_template_get(struct pool *p, struct ffs_error *err);
void pool_template_put(struct pool_template *t);

/* ---- pool-server.c ---- */

struct pool_ended { /* it ended by itself, and its directory is left to who had it */
	uint64_t id;
	struct ffs_child vm;
};

struct pool {
	const struct ffs_command *self;
	const struct ffs_target *target;
	struct ffs_restore_args *how;
	bool end_all; /* at the end, also those that are out */
	uint64_t began_ns;

	struct pool_name name;
	int signals, wake;
	struct pool_guard guard;
	struct ffs_pool_book book;
	struct pool_child *child; /* of book.place, by its index */
	struct pool_ended *ended; /* book.max of them, in a ring */
	unsigned n_ended;
	struct pool_client *client[POOL_CLIENTS];
	unsigned n_clients;
	unsigned running; /* jobs */
	int watch[POOL_STARTS];
	bool watch_used[POOL_STARTS];
	uint64_t accept_ns; /* nobody is let in before: no descriptor was left */

	pthread_mutex_t
		lock; /* closed, done, child->failed; and the start of a process. Nothing waits with it held but that */
	bool closed;
	struct pool_job *done;

	pthread_mutex_t template_lock; /* template; held while one is made */
	struct pool_template *template;
};

/* Until it is drained; an exit code. What it needs is there; *p is the caller's. */
int pool_serve(struct pool *p, struct ffs_error *err);
void pool_drain(struct pool *p, bool end_all);
bool pool_is_over(const struct pool *p);

/* ---- pool-children.c ---- */

/* What the bookkeeping says. */
void pool_begin_child(struct pool *p, unsigned at);
void pool_hand_out(struct pool *p, unsigned at, struct ffs_pool_waiter *w);
void pool_job_end(struct pool *p, unsigned at);
/* End a child that the bookkeeping has idle, handed or out. */
void pool_end_child(struct pool *p, unsigned at);
void pool_end_those_out(struct pool *p);
/* What the loop sees. */
void pool_take_what_is_done(struct pool *p);
void pool_child_ended(struct pool *p, unsigned at);
void pool_renew_guard(struct pool *p);
/* True: it is being ended, and the client is told when it is gone. */
bool pool_release(struct pool *p, uint64_t id, struct pool_client *c);
/* A child is its client's from now on. */
void pool_taken(struct pool *p, unsigned at);

/* ---- pool-status.c ---- */

struct json_object *pool_status(struct pool *p);

/* ---- pool-client.c ---- */

enum pool_client_state { POOL_SAYS, POOL_WAITS, POOL_OFFERED, POOL_RELEASES, POOL_DRAINS, POOL_GOES };

struct pool_client {
	struct ffs_pool_waiter waiter; /* first: the bookkeeping knows this */
	struct pool *pool;
	int fd;
	enum pool_client_state state;
	bool gone;            /* its connection has ended, but it has an order that is worked on */
	bool late;            /* it has waited too long for what is worked on */
	uint64_t deadline_ns; /* of what it shall do; UINT64_MAX: nothing */
	struct pool_order *order;
	int at;     /* the place of its child; -1: none */
	bool works; /* a thread has its order */
	char *in, *out;
	size_t in_len, in_room, out_len, out_at;
};

void pool_client_accept(struct pool *p);
short pool_client_events(const struct pool_client *c);
/* Its descriptor is ready, or its time is over. It may be gone afterwards. */
void pool_client_ready(struct pool_client *c, short revents);
/* When it has to be checked. */
uint64_t pool_client_due(const struct pool_client *c);
void pool_client_check(struct pool_client *c, uint64_t now_ns);
/* Say something and then let it go; the object is released. */
void pool_client_answer(struct pool_client *c, struct json_object *o);
void pool_client_refuse(struct pool_client *c, int code, const char *fmt, ...) FFS_PRINTF(3, 4);
/* Its child is ready: offer it. The object is released. */
void pool_client_offer(struct pool_client *c, struct json_object *o);
void pool_client_free(struct pool_client *c);

/* ---- pool-ask.c ---- */

int pool_acquire(const struct ffs_command *self, int argc, char **argv);
int pool_release_some(const struct ffs_command *self, int argc, char **argv);
int pool_ask_status(const struct ffs_command *self, int argc, char **argv);
int pool_ask_drain(const struct ffs_command *self, int argc, char **argv);
