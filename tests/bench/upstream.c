// A model provider that costs next to nothing, for tests/bench/run.py: one thread, epoll, HTTP/1.1 keep-alive.
//   cc -O2 -o upstream upstream.c && ./upstream PORT LATENCY_MS CHUNKS INTERVAL_MS
//
// Every request with a Content-Length is answered after LATENCY_MS in the shape of OpenAI's chat completions: one JSON
// object of about 900 bytes or, when the body holds "stream":true, a role event at once, CHUNKS text events one each
// INTERVAL_MS, then the finish event, the usage event (as if stream_options.include_usage were set) and [DONE].
// The same in Anthropic's shape at a path with /messages, and in Gemini's at one with GenerateContent (which streams).
// Bounds: a request has at most 64 kB; a reader who lets the socket buffer fill up is cut off.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MARK "########################"  // where the number of the answer goes: 24 hexadecimal digits
#define HEAD "HTTP/1.1 200 OK\r\nx-request-id: req_" MARK "\r\nopenai-processing-ms: 12\r\n" \
    "x-ratelimit-limit-requests: 30000\r\nx-ratelimit-remaining-requests: 29999\r\nopenai-version: 2020-10-01\r\n"
#define COMMON "\"id\":\"chatcmpl-" MARK "\",\"created\":%ld,\"model\":\"gpt-4o-mini-2024-07-18\"," \
    "\"service_tier\":\"default\",\"system_fingerprint\":\"fp_50906f2aac\""
#define CHOICE(delta, reason) "{\"index\":0,\"delta\":" delta ",\"logprobs\":null,\"finish_reason\":" reason "}"
#define USAGE "{\"prompt_tokens\":42,\"completion_tokens\":64,\"total_tokens\":106,\"prompt_tokens_details\":" \
    "{\"cached_tokens\":0,\"audio_tokens\":0},\"completion_tokens_details\":{\"reasoning_tokens\":0," \
    "\"audio_tokens\":0,\"accepted_prediction_tokens\":0,\"rejected_prediction_tokens\":0}}"
#define CLAUDE "\"id\":\"msg_" MARK "\",\"type\":\"message\",\"role\":\"assistant\"," \
    "\"model\":\"claude-haiku-4-5-20251001\""
#define CLAUDE_USAGE "\"usage\":{\"input_tokens\":42,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":0," \
    "\"output_tokens\":%d,\"service_tier\":\"standard\"}"
#define GEMINI "{\"candidates\":[{\"content\":{\"parts\":[{\"text\":\"%s\"}],\"role\":\"model\"}%s,\"index\":0}]," \
    "\"usageMetadata\":{\"promptTokenCount\":42,\"candidatesTokenCount\":64,\"totalTokenCount\":106}," \
    "\"modelVersion\":\"gemini-2.5-flash\",\"responseId\":\"" MARK "\"}"
#define TEXT "A fox met a dog at the edge of the wood, and they talked until the evening about the weather. "

typedef struct { char text[4096]; int size, marks, mark_at[4]; } Piece;
typedef struct { Piece whole, opening, token, closing; } Answer;

typedef struct Connection {
    int fd, used, busy, stream, sent;
    long due_us, number;
    Answer *answer;
    struct Connection *next;  // in the queue it waits in; busy as long as it does
    char in[65536];           // untouched pages cost nothing
} Connection;

// All who wait in one queue wait equally long, so a queue is in order of time without sorting.
typedef struct { Connection *head, *tail; long wait_us; } Queue;

static Answer openai, anthropic, gemini;
static Queue before_answer, before_token;
static int chunks, epoll_fd;
static long answers, now_us, started_s;

static long clock_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000L + t.tv_nsec / 1000;
}

__attribute__((format(printf, 2, 3))) static void append(Piece *piece, const char *format, ...) {
    char *at = piece->text + piece->size;
    va_list values;
    va_start(values, format);
    piece->size += vsnprintf(at, sizeof piece->text - piece->size, format, values);
    va_end(values);
    for (; (at = strstr(at, MARK)); at++) piece->mark_at[piece->marks++] = at - piece->text;
}

// One server-sent event as one chunk of the chunked transfer coding.
__attribute__((format(printf, 2, 3))) static void append_event(Piece *piece, const char *format, ...) {
    char event[1024];
    va_list values;
    va_start(values, format);
    int size = vsnprintf(event, sizeof event, format, values);
    va_end(values);
    append(piece, "%x\r\n%s\r\n", size, event);
}

static void append_chunk(Piece *piece, const char *choices, const char *usage, const char *padding) {
    append_event(piece, "data: {" COMMON ",\"object\":\"chat.completion.chunk\",\"choices\":[%s],"
        "\"usage\":%s,\"obfuscation\":\"%s\"}\n\n", started_s, choices, usage, padding);
}

__attribute__((format(printf, 2, 3))) static void append_whole(Answer *answer, const char *format, ...) {
    char body[2048];
    va_list values;
    va_start(values, format);
    int size = vsnprintf(body, sizeof body, format, values);
    va_end(values);
    append(&answer->whole, HEAD "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", size, body);
    append(&answer->opening,
        HEAD "Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n");
}

static void make_openai(Answer *answer) {
    append_whole(answer, "{" COMMON ",\"object\":\"chat.completion\",\"choices\":[{\"index\":0,"
        "\"message\":{\"role\":\"assistant\",\"content\":\"" TEXT TEXT TEXT "\",\"refusal\":null,\"annotations\":[]},"
        "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":" USAGE "}\n", started_s);
    append_chunk(
        &answer->opening, CHOICE("{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null}", "null"), "null", "L");
    append_chunk(&answer->token, CHOICE("{\"content\":\" fox\"}", "null"), "null", "utv78xV");
    append_chunk(&answer->closing, CHOICE("{}", "\"stop\""), "null", "J32gM");
    append_chunk(&answer->closing, "", USAGE, "eUG8y");
    append(&answer->closing, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
}

static void make_anthropic(Answer *answer) {
    append_whole(answer, "{" CLAUDE ",\"content\":[{\"type\":\"text\",\"text\":\"" TEXT TEXT TEXT "\"}],"
        "\"stop_reason\":\"end_turn\",\"stop_sequence\":null," CLAUDE_USAGE "}", 64);
    append_event(&answer->opening, "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{" CLAUDE
        ",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null," CLAUDE_USAGE "}}\n\n", 1);
    append_event(&answer->opening, "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,"
        "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n");
    append_event(&answer->token, "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,"
        "\"delta\":{\"type\":\"text_delta\",\"text\":\" fox\"}}\n\n");
    append_event(&answer->closing,
        "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n");
    append_event(&answer->closing, "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":"
        "\"end_turn\",\"stop_sequence\":null},\"usage\":{\"output_tokens\":64}}\n\n");
    append_event(&answer->closing, "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n");
    append(&answer->closing, "0\r\n\r\n");
}

static void make_gemini(Answer *answer) {
    append_whole(answer, GEMINI, TEXT TEXT TEXT, ",\"finishReason\":\"STOP\"");
    append_event(&answer->token, "data: " GEMINI "\r\n\r\n", " fox", "");
    append_event(&answer->closing, "data: " GEMINI "\r\n\r\n", "", ",\"finishReason\":\"STOP\"");
    append(&answer->closing, "0\r\n\r\n");
}

static void hang_up(Connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    if (!c->busy) free(c);  // else the queue still knows it and frees it in its turn
}

static void say(Connection *c, Piece *piece) {
    char digits[sizeof MARK];
    snprintf(digits, sizeof digits, "%024lx", c->number);
    for (int i = 0; i < piece->marks; i++) memcpy(piece->text + piece->mark_at[i], digits, sizeof MARK - 1);
    if (c->fd >= 0 && send(c->fd, piece->text, piece->size, MSG_NOSIGNAL) != piece->size) shutdown(c->fd, SHUT_RDWR);
}

static void wait_in(Queue *queue, Connection *c) {
    c->due_us = now_us + queue->wait_us;
    c->next = NULL;
    c->busy = 1;
    queue->tail = *(queue->head ? &queue->tail->next : &queue->head) = c;
}

// Says what is due and tells for what to wait next, if anything.
static Queue *go_on(Connection *c) {
    if (!c->stream) return say(c, &c->answer->whole), NULL;
    say(c, c->sent++ ? &c->answer->token : &c->answer->opening);
    for (; !before_token.wait_us && c->sent <= chunks; c->sent++) say(c, &c->answer->token);
    if (c->sent <= chunks) return &before_token;
    return say(c, &c->answer->closing), NULL;
}

// Size of the request at the start of the buffer, 0 while it is incomplete, -1 if it is not understood.
static int request_size(Connection *c, char **body) {
    char *end = strstr(c->in, "\r\n\r\n"), *coding = strcasestr(c->in, "\r\ntransfer-encoding:");
    char *length = strcasestr(c->in, "\r\ncontent-length:");
    if (!end) return c->used < (int)sizeof c->in - 1 ? 0 : -1;
    if (coding && coding < end) return -1;
    *body = end + 4;
    long size = *body - c->in + (length && length < end ? strtol(length + 17, NULL, 10) : 0);
    if (size < 0 || size >= (long)sizeof c->in) return -1;
    return c->used >= size ? size : 0;
}

// In whose shape a request is answered, and whether piece by piece; the head and the body are texts of their own here.
static void understand(Connection *c, char *body) {
    char *stream = strstr(body, "\"stream\":"), *line_end = strchr(c->in, '\r');
    *line_end = 0;
    c->stream = stream && !strncmp(stream + 9 + (stream[9] == ' '), "true", 4);
    c->answer = &openai;
    if (strstr(c->in, "/messages")) c->answer = &anthropic;
    if (strcasestr(c->in, "GenerateContent")) c->answer = &gemini, c->stream = !!strstr(c->in, ":stream");
}

static int serve(Connection *c) {
    while (!c->busy && c->used) {
        char *body;
        int size = request_size(c, &body);
        if (size <= 0) return size;
        understand(c, body);
        c->sent = 0;
        c->number = ++answers;
        memmove(c->in, c->in + size, (c->used -= size) + 1);
        Queue *queue = before_answer.wait_us ? &before_answer : go_on(c);
        if (queue) wait_in(queue, c);
    }
    return 0;
}

static void wake(Queue *queue) {
    while (queue->head && queue->head->due_us <= now_us) {
        Connection *c = queue->head;
        queue->head = c->next;
        c->busy = 0;
        Queue *next = c->fd < 0 ? NULL : go_on(c);
        if (next) wait_in(next, c);
        else if (c->fd < 0 || serve(c) < 0) hang_up(c);
    }
}

static void hear(Connection *c) {
    ssize_t got = read(c->fd, c->in + c->used, sizeof c->in - 1 - c->used);
    if (got < 0 && errno == EAGAIN) return;
    if (got > 0) c->in[c->used += got] = 0;
    if (got <= 0 || serve(c) < 0) hang_up(c);
}

static void welcome(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        Connection *c = calloc(1, sizeof *c);
        struct epoll_event event = {EPOLLIN, {.ptr = c}};
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        c->fd = fd;
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

static int patience_ms(void) {
    Connection *a = before_answer.head, *b = before_token.head, *first = !b || (a && a->due_us < b->due_us) ? a : b;
    long left_us = first ? first->due_us - clock_us() : -1;
    return !first ? -1 : left_us > 0 ? (left_us + 999) / 1000 : 0;
}

int main(int argc, char **argv) {
    if (argc != 5) return fprintf(stderr, "usage: upstream PORT LATENCY_MS CHUNKS INTERVAL_MS\n"), 2;
    started_s = time(NULL);
    chunks = atoi(argv[3]);
    before_answer.wait_us = atoi(argv[2]) * 1000L;
    before_token.wait_us = atoi(argv[4]) * 1000L;
    make_openai(&openai);
    make_anthropic(&anthropic);
    make_gemini(&gemini);
    struct sockaddr_in address = {AF_INET, htons(atoi(argv[1])), {htonl(INADDR_LOOPBACK)}, {0}};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) return perror("upstream"), 1;
    epoll_fd = epoll_create1(0);
    struct epoll_event event = {EPOLLIN, {.ptr = NULL}}, events[256];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 256, patience_ms());
        now_us = clock_us();
        for (int i = 0; i < count; i++)
            events[i].data.ptr ? hear(events[i].data.ptr) : welcome(listener);
        wake(&before_answer);
        wake(&before_token);
    }
}
