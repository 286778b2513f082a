/* `hear[,port=5242]`: what a host has at that port of vsock, in the guest itself (vsock_loopback): takes a connection, reads a
 * line, closes it.
 *
 *     hear ready
 *     hear TEXT
 *
 * One thread. */
#include "guest.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

int hear_main(int argc, char **argv)
{
	struct sockaddr_vm a = {.svm_family = AF_VSOCK,
		.svm_port = (unsigned)guest_arg(argc, argv, "port", 5242),
		.svm_cid = VMADDR_CID_ANY};
	int sock = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (sock < 0 || bind(sock, (struct sockaddr *)&a, sizeof(a)) < 0 || listen(sock, 8) < 0) {
		guest_say("hear: %m");
		return 1;
	}
	guest_say("hear ready");
	for (;;) {
		char text[600];
		size_t len = 0;
		int fd = accept(sock, NULL, NULL);

		if (fd < 0)
			continue;
		while (len < sizeof(text) && (!len || text[len - 1] != '\n')) {
			ssize_t n = read(fd, text + len, sizeof(text) - len);

			if (n <= 0)
				break;
			len += (size_t)n;
		}
		guest_say("hear %.*s", (int)(len && text[len - 1] == '\n' ? len - 1 : len), text);
		close(fd);
	}
}
