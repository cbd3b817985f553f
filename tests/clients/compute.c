/* Scores one image and prints the daemon's reply: compute SOCKET IMAGE
 *
 * The image is opened here and its descriptor sent, so the daemon needs no permission of its own.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct iovec request = {.iov_base = "{}\n", .iov_len = 3};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr message = {
        .msg_iov = &request,
        .msg_iovlen = 1,
        .msg_control = control.space,
        .msg_controllen = sizeof control.space,
    };
    char reply[65536];
    size_t length = 0;

    if (argc != 3 || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    int image = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (image < 0)
        return perror(argv[2]), 1;

    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strcpy(address.sun_path, argv[1]);
    if (connect(connection, (struct sockaddr *)&address, sizeof address) < 0)
        return perror(argv[1]), 3;

    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof image);
    memcpy(CMSG_DATA(header), &image, sizeof image);
    if (sendmsg(connection, &message, MSG_NOSIGNAL) != (ssize_t)request.iov_len)
        return perror("sendmsg"), 3;

    while (length < sizeof reply && (length == 0 || reply[length - 1] != '\n')) {
        ssize_t count = recv(connection, reply + length, sizeof reply - length, 0);
        if (count <= 0)
            return perror("recv"), 3;
        length += (size_t)count;
    }
    fwrite(reply, 1, length, stdout);
    return 0;
}
