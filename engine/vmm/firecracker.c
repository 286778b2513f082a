/* The driver "firecracker": the stock, unmodified Firecracker from 1.7 on, jailed or not. Owns the way its
 * device state gets out without its memory.
 *
 * PUT /snapshot/create writes the state file, syncs it, and only then opens the memory file
 * (src/vmm/src/persist.rs, create_snapshot). With a FIFO that we read as the state file the state is in our
 * hands when the sync fails: 400, and that is the expected answer. Between it and Resume nothing moves guest
 * memory: after a Pause the VMM's thread waits for requests alone, devices and timers included. Where the VM
 * was found paused a plain file and a memory file that cannot be opened do the same a little slower, but
 * leave nobody waiting in open(2) should we die.
 *
 * Threads: as api.c. No locks. Every wait has a deadline. */
#include "vmm/api.h"

#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"

#define STATE_MAX (256u << 20)
/* What Firecracker says after it has written the state, all versions from 1.7 to 1.17. */
#define FAULT_FIFO "sync_all on the snapshot backing file"
#define FAULT_FILE "on the memory backing file"

static int fc_connect(const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_vmm **out,
	struct ffs_error *err)
{
	struct ffs_api *d = calloc(1, sizeof(*d));

	if (!d)
		return ffs_error_set(err, ENOMEM, "no memory for a VMM");
	ffs_api_init(d, &ffs_firecracker_ops);
	int r = ffs_api_connect(d, opt->firecracker_socket, opt->pid, cancel, err);

	if (!r && strcmp(d->app, "Firecracker") != 0)
		r = ffs_error_set(err, ENOTSUP, "what is behind %.200s calls itself '%s', not Firecracker",
			opt->firecracker_socket, d->app);
	/* its server carries out the requests of one connection one after the other */
	d->pipelines = true;
	d->has_disks = opt->n_disks > 0;
	if (r)
		ffs_api_close(&d->vmm);
	else
		*out = &d->vmm;
	return r;
}

static void fc_finish(struct ffs_vmm *vmm)
{
	struct ffs_api *d = ffs_api_of(vmm);

	if (d->window)
		ffs_api_place_remove(&d->place, FFS_API_STATE_FILE);
	ffs_close_fd(&d->fifo);
	d->window = false;
	d->vmstate_fd = -1;
}

static int fc_prepare(struct ffs_vmm *vmm, int vmstate_fd, bool *was_running, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);

	fc_finish(vmm); /* of a branch that never got to its own */
	int r = ffs_api_prepare(d, vmstate_fd, was_running, err);

	if (!r)
		r = ffs_api_look_at_drives(d, err);
	if (!r && *was_running)
		r = ffs_api_place_fifo(&d->place, FFS_API_STATE_FILE, &d->fifo, err);
	if (r)
		fc_finish(vmm);
	return r;
}

struct drain {
	struct ffs_http_wait wait; /* first */
	struct ffs_api *d;
	uint64_t bytes;
	bool ended; /* the writer has closed it */
};

static int empty(struct ffs_http_wait *w, struct ffs_error *err)
{
	struct drain *k = (struct drain *)w;
	char buf[65536];

	for (;;) {
		ssize_t n = read(k->d->fifo, buf, sizeof(buf));

		if (n == 0) {
			k->ended = true;
			k->wait.fd = -1; /* or poll(2) would say so for ever */
			return 0;
		}
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return 0;
		if (n > 0 && k->bytes + (uint64_t)n > STATE_MAX)
			return ffs_error_set(err, EFBIG,
				"the device state of Firecracker is larger than %u MiB", STATE_MAX >> 20);
		if (n > 0) {
			ssize_t put = ffs_pwrite_full(k->d->vmstate_fd, buf, (size_t)n, k->bytes);

			k->bytes += (uint64_t)n;
			if (put == n)
				continue;
			n = put;
			errno = put < 0 ? (int)-put : EIO;
		}
		return ffs_error_errno(err, errno, "keep the device state of Firecracker");
	}
}

static int save_by_fifo(struct ffs_api *d, uint64_t deadline_ns, struct ffs_error *err)
{
	struct drain k = {.wait = {.fd = d->fifo, .ready = empty}, .d = d};
	struct ffs_http_answer a = {0};
	char text[300];
	/* should the memory file be reached all the same, it cannot be opened below something that is no
	 * directory */
	int r = ffs_api_create(d, "Full", "/memory", &k.wait, deadline_ns, &a, err);

	if (r)
		return r;
	ffs_api_fault(&a, text);
	if (a.status != 400 || !strstr(text, FAULT_FIFO))
		r = ffs_error_set(err, a.status == 204 ? EPROTO : EIO,
			"Firecracker %s did not save its device state into a FIFO: %s", d->version, text);
	ffs_http_answer_free(&a);
	if (!r && !k.ended)
		r = empty(&k.wait, err);
	if (!r && (!k.ended || !k.bytes))
		r = ffs_error_set(err, EIO, "the device state of Firecracker did not arrive (%llu bytes)",
			(unsigned long long)k.bytes);
	return r;
}

static int fc_save(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);
	int r = FFS_FAULT("vmm-save");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-save");
	if (d->sent_pause)
		return save_by_fifo(d, deadline_ns, err);
	ffs_close_fd(&d->fifo); /* paused by somebody since it was made */
	r = ffs_api_place_file(&d->place, FFS_API_STATE_FILE, err);
	return r ? r : ffs_api_save_file(d, "Full", "/memory", 400, FAULT_FILE, deadline_ns, err);
}

static void fc_describe(struct ffs_vmm *vmm, struct json_object *obj)
{
	ffs_api_describe(ffs_api_of(vmm), obj);
	json_object_object_add(obj, "vmstate_kind", json_object_new_string("firecracker"));
}

const struct ffs_vmm_ops ffs_firecracker_ops = {
	.kind = "firecracker",
	.connect = fc_connect,
	.geometry = ffs_fc_geometry,
	.prepare = fc_prepare,
	.pause = ffs_api_pause,
	.save = fc_save,
	.resume = ffs_api_resume,
	.finish = fc_finish,
	.run_state = ffs_api_run_state,
	.socket = ffs_api_socket,
	.rescue = ffs_api_rescue,
	.describe = fc_describe,
	.close = ffs_api_close,
};
