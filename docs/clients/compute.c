/* Scores one image by its descriptor: compute IMAGE [SOCKET]
 *
 * The image is opened here, so the daemon needs no permission of its own to read it. The exit
 * status is 1 where the image cannot be scored, 3 where the daemon does not answer, is busy or
 * late.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

static char reply[65536 + 1]; /* the longest line, and the NUL behind it */

/* How long the string at TEXT is in JSON. It is shown as it is there: escaped, and in ASCII. */
static int length(const char *text)
{
    int at = 0;
    while (text[at] != '\0' && text[at] != '"')
        at += text[at] == '\\' && text[at + 1] != '\0' ? 2 : 1;
    return at;
}

/* Print the scores or the error. A reply is compact, and in a string of JSON's a quote has a
 * backslash before it: what is looked for here can only be a key. */
static int show(void)
{
    static double scores[sizeof reply / 2];
    const char *code = strstr(reply, "\"code\":\""), *message = strstr(reply, "\"message\":\"");
    char *at = strstr(reply, "\"scores\":["), *end = at ? at + strlen("\"scores\":") : reply;
    size_t count = 0;

    if (strstr(reply, "\"error\":{") && code && message) {
        code += strlen("\"code\":\""), message += strlen("\"message\":\"");
        fprintf(stderr, "%.*s: %.*s\n", length(code), code, length(message), message);
        return strstr(reply, "\"retryable\":true") || !strncmp(code, "timeout\"", 8) ? 3 : 1;
    }
    for (; at && end != at && (*end == '[' || *end == ','); count++)
        scores[count] = strtod(at = end + 1, &end);
    if (count == 0 || end == at || *end != ']' || strstr(reply, "\"error\":"))
        return fputs("bad_reply: neither scores nor an error\n", stderr), 1;
    for (size_t i = 0; i < count; i++)
        printf("%.6f%c", scores[i], i + 1 < count ? ',' : '\n');
    return fflush(stdout) == 0 ? 0 : (perror("internal"), 1);
}

int main(int argc, char **argv)
{
    const char *path = argc > 2 ? argv[2] : getenv("SWIPR_SOCKET");
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/swipr/swipr.sock"};
    struct timeval patience = {.tv_sec = 30};
    struct iovec request = {.iov_base = "{\"timeout_ms\":30000}\n", .iov_len = 21};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {.header = {.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct msghdr message = {.msg_iov = &request, .msg_iovlen = 1,
                             .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t count = 1, used = 0;

    if (argc < 2 || argc > 3 || (path && strlen(path) >= sizeof address.sun_path))
        return fputs("usage: compute IMAGE [SOCKET]\n", stderr), 2;
    /* O_NONBLOCK: a pipe without a writer would keep us waiting. */
    int image = open(argv[1], O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (image < 0)
        return fprintf(stderr, "%s: %s\n", errno == ENOENT || errno == ENOTDIR ? "not_found" :
                       errno == EACCES ? "permission_denied" : "not_a_file", strerror(errno)), 1;
    control.header.cmsg_len = CMSG_LEN(sizeof image);
    memcpy(CMSG_DATA(&control.header), &image, sizeof image);

    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (path && *path)
        strcpy(address.sun_path, path);
    /* EPIPE: whoever is turned away, as one too many, can still read why. */
    if (connect(connection, (struct sockaddr *)&address, sizeof address) < 0 ||
        (sendmsg(connection, &message, MSG_NOSIGNAL) < 0 && errno != EPIPE))
        count = -1;
    while (count > 0 && (used == 0 || reply[used - 1] != '\n'))
        if ((count = recv(connection, reply + used, sizeof reply - 1 - used, 0)) > 0)
            used += count;
    if (count > 0)
        return show();
    int is_late = count < 0 && errno == EAGAIN;
    fprintf(stderr, "%s: %s: %s\n", is_late ? "timeout" : "cannot_connect", address.sun_path,
            is_late ? "no answer within 30 s" : count < 0 ? strerror(errno) : "no answer");
    return 3;
}
