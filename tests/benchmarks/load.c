// Keeps a number of requests in flight on each of some connections and times the answers.
//
//     load PORT CONNECTIONS IN_FLIGHT CALLS REQUEST [QUESTION]
//
// REQUEST is the JSON of a packet, always sent as it stands; so all answers must be the same, and are compared.
// One that begins with "GET " is sent over HTTP/1.1 instead, and the bodies are compared.
// With a QUESTION the requests are events, sent as fast as they are taken; it is asked after the last one, and
// its answer ends the run. Prints one line of JSON: times in seconds, latencies in milliseconds.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

#include "frames.h"
#include "http.h"

typedef struct {
    int socket;
    long to_send, to_hear;
    char in[BUFFER];
    size_t held;
    char *out;  // the frames of one round, one after the other
    size_t unsent;  // bytes that the socket did not take
    double *sent_at;  // a ring: answers come in the order of the requests
    long head, tail;
} Connection;

static char frame[BUFFER / 4], answer[BUFFER / 4];
static size_t frame_size, answer_size;
static int in_flight, events, http;
static double *latencies;
static long heard, failed;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static double cpu(void) {
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static int by_size(const void *one, const void *other) {
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

static void wait_writable(int socket) {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(socket, &set);
    if (select(socket + 1, NULL, &set, NULL, NULL) < 0) {
        fail("select");
    }
}

static void send_all(int socket, const char *data, size_t size) {
    while (size > 0) {
        ssize_t taken = send(socket, data, size, MSG_NOSIGNAL);
        if (taken < 0 && errno == EAGAIN) {
            wait_writable(socket);
        } else if (taken < 0) {
            fail("send");
        } else {
            data += taken;
            size -= taken;
        }
    }
}

static void request(Connection *one, long count) {
    if (count > one->to_send) {
        count = one->to_send;
    }
    one->to_send -= count;
    double at = now();
    for (long i = 0; i < count; i++) {
        one->sent_at[one->head++ % in_flight] = at;
    }
    send_all(one->socket, one->out, count * frame_size);
}

static void take(char *body, size_t size) {
    if (answer_size == 0) {
        memcpy(answer, body, size);
        answer_size = size;
    }
    failed += size != answer_size || memcmp(answer, body, size) != 0;
}

static char *next(char *from, char *to, char **body, size_t *size) {
    if (http) {
        return next_answer(from, to, body, size);
    }
    char *end = next_frame(from, to, body);
    *size = end - *body;
    return end;
}

static void receive(Connection *one) {
    ssize_t size = recv(one->socket, one->in + one->held, BUFFER - one->held, 0);
    if (size < 0 && errno == EAGAIN) {
        return;
    }
    if (size <= 0) {
        fputs("the server closed the connection\n", stderr);
        exit(1);
    }
    one->held += size;
    double at = now();
    char *from = one->in, *to = one->in + one->held, *body = from, *end;
    size_t length;
    long answers = 0;
    while ((end = next(from, to, &body, &length)) != NULL) {
        take(body, length);
        latencies[heard++] = at - one->sent_at[one->tail++ % in_flight];
        answers++;
        from = end;
    }
    one->held = to - from;
    memmove(one->in, from, one->held);
    one->to_hear -= answers;
    request(one, answers);
}

static void open_connection(Connection *one, int port, long calls) {
    one->socket = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    if (connect(one->socket, (struct sockaddr *)&address, sizeof address) < 0) {
        fail("connect");
    }
    int on = 1;
    setsockopt(one->socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(one->socket, F_SETFL, O_NONBLOCK);
    one->to_send = one->to_hear = calls;
    one->sent_at = calloc(in_flight, sizeof(double));
    one->out = malloc(frame_size * in_flight);
    for (int i = 0; i < in_flight; i++) {
        memcpy(one->out + i * frame_size, frame, frame_size);
    }
}

int main(int count, char **words) {
    if (count < 6) {
        fputs("usage: load PORT CONNECTIONS IN_FLIGHT CALLS REQUEST [QUESTION]\n", stderr);
        return 2;
    }
    int port = atoi(words[1]), connections = atoi(words[2]);
    in_flight = atoi(words[3]);
    long calls = atol(words[4]) / connections;
    events = count > 6;
    http = strncmp(words[5], "GET ", 4) == 0;
    frame_size = http ? snprintf(frame, sizeof frame, "%s", words[5])
                      : snprintf(frame, sizeof frame, "%zu#%s", strlen(words[5]), words[5]);
    if (frame_size >= sizeof frame) {
        fputs("the request is too large\n", stderr);
        return 2;
    }
    latencies = calloc(calls * connections + 1, sizeof(double));
    Connection *all = calloc(connections, sizeof(Connection));
    int poll = epoll_create1(0);
    for (int i = 0; i < connections; i++) {
        open_connection(&all[i], port, calls);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
        epoll_ctl(poll, EPOLL_CTL_ADD, all[i].socket, &event);
    }
    double started = now(), cpu_before = cpu();
    for (int i = 0; i < connections; i++) {
        if (events) {
            while (all[i].to_send > 0) {
                request(&all[i], in_flight);
            }
            char question[4096];
            int size = snprintf(question, sizeof question, "%zu#%s", strlen(words[6]), words[6]);
            send_all(all[i].socket, question, size);
            all[i].to_hear = 1;
            all[i].tail = all[i].head - 1;
        } else {
            request(&all[i], in_flight);
        }
    }
    for (int open = connections; open > 0;) {
        struct epoll_event ready[64];
        int number = epoll_wait(poll, ready, 64, 20000);
        if (number <= 0) {
            fputs("no answer within 20 s\n", stderr);
            return 1;
        }
        for (int i = 0; i < number; i++) {
            Connection *one = ready[i].data.ptr;
            if (one->to_hear > 0) {
                receive(one);
                open -= one->to_hear <= 0;
            }
        }
    }
    double seconds = now() - started, used = cpu() - cpu_before;
    qsort(latencies, heard, sizeof(double), by_size);
    printf("{\"calls\":%ld,\"failed\":%ld,\"seconds\":%.6f,\"cpu\":%.6f,\"p50\":%.4f,\"p99\":%.4f,\"answer\":%.*s}\n",
           calls * connections, failed, seconds, used, latencies[heard / 2] * 1e3, latencies[heard * 99 / 100] * 1e3,
           (int)answer_size, answer);
    return 0;
}
