// Cuts answers of HTTP/1.1, by Content-Length or in chunks; any status but 200 ends the run.
#include <strings.h>

// Returns where the value of a header begins, or NULL without it; `head` ends with an empty line.
static char *header(char *head, char *end, const char *name) {
    size_t length = strlen(name);
    for (char *line = head; (line = memchr(line, '\n', end - line)) != NULL && ++line < end;) {
        if (strncasecmp(line, name, length) == 0) {
            return line + length;
        }
    }
    return NULL;
}

// Walks over chunks up to `to`; returns the end of the last, or NULL while it is not there. Joined, they are at `out`.
static char *next_chunks(char *at, char *to, char *out, size_t *size) {
    *size = 0;
    for (;;) {
        char *line = memmem(at, to - at, "\r\n", 2);
        size_t length = strtoul(at, NULL, 16);
        if (line == NULL || length + 4 > (size_t)(to - line)) {
            return NULL;
        }
        if (out != NULL) {
            memmove(out + *size, line + 2, length);
        }
        *size += length;
        at = line + 2 + length + 2;
        if (length == 0) {
            return at;
        }
    }
}

// Finds the first whole answer between `from` and `to`; returns its end, or NULL while it is not all there.
static char *next_answer(char *from, char *to, char **body, size_t *size) {
    char *end = memmem(from, to - from, "\r\n\r\n", 4);
    if (end == NULL) {
        return NULL;
    }
    if (strncmp(from, "HTTP/1.1 200 ", 13) != 0) {
        fprintf(stderr, "answered by %.*s\n", (int)(strchr(from, '\r') - from), from);
        exit(1);
    }
    *body = end + 4;
    char *length = header(from, end + 2, "content-length:");
    if (length != NULL) {
        *size = strtoul(length, NULL, 10);
        return *size <= (size_t)(to - *body) ? *body + *size : NULL;
    }
    if (header(from, end + 2, "transfer-encoding: chunked") == NULL) {
        fputs("an answer without a length\n", stderr);
        exit(1);
    }
    char *last = next_chunks(*body, to, NULL, size);
    return last == NULL ? NULL : next_chunks(*body, to, *body, size);  // joined once they are all there
}
