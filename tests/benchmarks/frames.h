// What the load and its counterpart share: NestJS's TCP frames, `<length>#<json>`, all of them ASCII here.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUFFER = 1 << 18 };

static void fail(const char *what) {
    perror(what);
    exit(1);
}

// Finds the first whole frame between `from` and `to`; returns its end, or NULL while it is not all there.
static char *next_frame(char *from, char *to, char **body) {
    char *mark = memchr(from, '#', to - from);
    if (mark == NULL) {
        return NULL;
    }
    *body = mark + 1;
    char *end = *body + strtoul(from, NULL, 10);
    return end <= to ? end : NULL;
}
