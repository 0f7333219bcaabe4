// Answers every request of NestJS's TCP protocol with the sum of its numbers, so that only the client is measured: `answers PORT`.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sys/socket.h>

#include "frames.h"

static void send_all(int socket, const char *data, size_t size) {
    while (size > 0) {
        ssize_t taken = send(socket, data, size, MSG_NOSIGNAL);
        if (taken <= 0) {
            return;
        }
        data += taken;
        size -= taken;
    }
}

static size_t answer(char *body, char *end, char *out) {
    char *id = memmem(body, end - body, "\"id\":\"", 6);
    if (id == NULL) {  // an event
        return 0;
    }
    id += 6;
    long sum = 0;
    for (char *at = (char *)memmem(body, end - body, "\"data\":[", 8) + 8; at < end && at[-1] != ']'; at++) {
        sum += strtol(at, &at, 10);
    }
    int size = (char *)memchr(id, '"', end - id) - id;
    char text[256];
    int length = snprintf(text, sizeof text, "{\"response\":%ld,\"isDisposed\":true,\"id\":\"%.*s\"}", sum, size, id);
    return sprintf(out, "%d#%s", length, text);
}

static void *serve(void *argument) {
    int socket = (int)(long)argument;
    char *in = malloc(BUFFER), *out = malloc(4 * BUFFER);
    size_t held = 0;
    ssize_t size;
    while ((size = recv(socket, in + held, BUFFER - held, 0)) > 0) {
        held += size;
        char *from = in, *to = in + held, *body, *end;
        size_t filled = 0;
        while ((end = next_frame(from, to, &body)) != NULL) {
            filled += answer(body, end, out + filled);
            from = end;
        }
        held = to - from;
        memmove(in, from, held);
        send_all(socket, out, filled);
    }
    close(socket);
    free(in);
    free(out);
    return NULL;
}

int main(int count, char **words) {
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(count > 1 ? atoi(words[1]) : 0)};
    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 16) < 0) {
        fail("listen");
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        int socket = accept(listener, NULL, NULL);
        if (socket < 0) {
            fail("accept");
        }
        setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        pthread_t thread;
        pthread_create(&thread, NULL, serve, (void *)(long)socket);
        pthread_detach(thread);
    }
}
