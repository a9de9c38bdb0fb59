/* Faults in the file operations of one process, below one folder. Loaded with LD_PRELOAD, armed with `fault_arm`.

   The k-th operation that counts fails, or the process is killed in its place. What counts is a mask of CHANGE, WRITE,
   GROW and READ. Operations of the C library are replaced by name; which file a descriptor stands for is asked of
   /proc, so that it does not matter who opened it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CHANGE = 1, WRITE = 2, GROW = 4, READ = 8 };  /* a change of the disk; of content; that needs room; none */
enum { NOTHING, KILL, TEAR, FAIL, FAIL_FROM_THEN_ON };

static char folder[PATH_MAX];
static size_t folder_length;
static int armed, fault, counted, error_code, no_exchange, log_descriptor = -1;
static long at;
static atomic_long count;

void fault_arm(const char *below, int kind, int mask, long point, int code, int without_exchange, int log_to) {
    folder_length = strlen(strncpy(folder, below, sizeof folder - 1));
    fault = kind, counted = mask, at = point, error_code = code;
    no_exchange = without_exchange, log_descriptor = log_to;
    count = 0;
    armed = 1;
}

long fault_count(void) { return count; }

void fault_disarm(void) { armed = 0; }

static int below(const char *path) {
    return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || path[folder_length] == 0);
}

static void path_of(int descriptor, char *found) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, found, PATH_MAX - 1);
    found[length > 0 ? length : 0] = 0;
}

static void resolve(int directory, const char *path, char *found) {
    if (path[0] == '/') {
        snprintf(found, PATH_MAX, "%s", path);
        return;
    }
    char base[PATH_MAX] = "";
    if (directory != AT_FDCWD) path_of(directory, base);
    else if (!getcwd(base, sizeof base)) base[0] = 0;
    if (snprintf(found, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) found[0] = 0;
}

static void write_log(const char *name, const char *path, const char *other) {
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", name, path, other ? other : "");
    if (log_descriptor >= 0) syscall(SYS_write, log_descriptor, line, length);
}

/* What is to happen to an operation: NOTHING, TEAR (a write, which then kills), or FAIL. A kill does not return. */
static int verdict(const char *name, int classes, const char *path, const char *other) {
    if (!armed || !(below(path) || (other && below(other)))) return NOTHING;
    write_log(name, path, other);
    if (!(classes & counted)) return NOTHING;
    long number = ++count;
    if (fault == FAIL_FROM_THEN_ON && number >= at) return errno = error_code, FAIL;
    if (number != at) return NOTHING;
    if (fault == KILL || (fault == TEAR && !(classes & WRITE))) kill(getpid(), SIGKILL);
    if (fault == FAIL) errno = error_code;
    return fault;
}

static int verdict_on(const char *name, int classes, int descriptor) {
    char path[PATH_MAX];
    if (!armed) return NOTHING;
    path_of(descriptor, path);
    return verdict(name, classes, path, NULL);
}

static int verdict_at(const char *name, int classes, int directory, const char *path) {
    char found[PATH_MAX];
    if (!armed) return NOTHING;
    resolve(directory, path, found);
    return verdict(name, classes, found, NULL);
}

static int verdict_between(const char *name, int classes, int from, const char *path, int to, const char *other) {
    char found[PATH_MAX], second[PATH_MAX];
    if (!armed) return NOTHING;
    resolve(from, path, found);
    resolve(to, other, second);
    return verdict(name, classes, found, second);
}

/* One result for each verdict: the real call, a half and the end of the process, an error. */
#define DECIDE(type, decision, whole, half)                 \
    do {                                                    \
        switch (decision) {                                 \
        case TEAR: (void)!(half); kill(getpid(), SIGKILL); return (type)-1; \
        case FAIL: case FAIL_FROM_THEN_ON: return (type)-1; \
        default: return (whole);                            \
        }                                                   \
    } while (0)
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int open_at(const char *name, int directory, const char *path, int flags, mode_t mode) {
    int creates = flags & (O_CREAT | O_TRUNC) || (flags & O_TMPFILE) == O_TMPFILE;
    int classes = creates ? CHANGE | GROW : READ;
    DECIDE(int, verdict_at(creates ? "create" : name, classes, directory, path),
           (int)syscall(SYS_openat, directory, path, flags, mode), 0);
}

#define OPEN(name)                                                  \
    int name(const char *path, int flags, ...) {                    \
        va_list rest;                                               \
        va_start(rest, flags);                                      \
        mode_t mode = va_arg(rest, mode_t);                         \
        va_end(rest);                                               \
        return open_at("open", AT_FDCWD, path, flags, mode);        \
    }
#define OPENAT(name)                                                \
    int name(int directory, const char *path, int flags, ...) {     \
        va_list rest;                                               \
        va_start(rest, flags);                                      \
        mode_t mode = va_arg(rest, mode_t);                         \
        va_end(rest);                                               \
        return open_at("open", directory, path, flags, mode);       \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
int __open_2(const char *path, int flags) { return open_at("open", AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_at("open", AT_FDCWD, path, flags, 0); }

/* A full disk takes the first half of the write that fills it, as real ones do; the next one fails. */
static ssize_t written(const char *name, int descriptor, const struct iovec *parts, int number, off_t offset) {
    struct iovec half = {parts[0].iov_base, (parts[0].iov_len + 1) / 2};
    long place = offset < 0 ? -1 : offset;
    int decision = verdict_on(name, CHANGE | WRITE | GROW, descriptor);
    if (decision == FAIL_FROM_THEN_ON && count == at && half.iov_len < parts[0].iov_len) {
        decision = NOTHING;
        parts = &half, number = 1;
    }
    if (place < 0)
        DECIDE(ssize_t, decision, syscall(SYS_writev, descriptor, parts, number), syscall(SYS_writev, descriptor, &half, 1));
    DECIDE(ssize_t, decision, syscall(SYS_pwritev, descriptor, parts, number, place, 0),
           syscall(SYS_pwritev, descriptor, &half, 1, place, 0));
}

ssize_t write(int descriptor, const void *content, size_t length) {
    struct iovec part = {(void *)content, length};
    return written("write", descriptor, &part, 1, -1);
}

#define PWRITE(name)                                                                    \
    ssize_t name(int descriptor, const void *content, size_t length, off_t offset) {    \
        struct iovec part = {(void *)content, length};                                  \
        return written("write", descriptor, &part, 1, offset);                          \
    }
#define PWRITEV(name)                                                                   \
    ssize_t name(int descriptor, const struct iovec *parts, int number, off_t offset) { \
        return written("write", descriptor, parts, number, offset);                     \
    }
PWRITE(pwrite) PWRITE(pwrite64) PWRITEV(pwritev) PWRITEV(pwritev64)
ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    return written("write", descriptor, parts, number, -1);
}

#define SENDFILE(name)                                                                                            \
    ssize_t name(int to, int from, off_t *offset, size_t length) {                                                \
        DECIDE(ssize_t, verdict_on("write", CHANGE | WRITE | GROW, to), REAL(sendfile)(to, from, offset, length), \
               REAL(sendfile)(to, from, offset, length / 2));                                                     \
    }
SENDFILE(sendfile) SENDFILE(sendfile64)

#define READING(name, arguments, values)                                                        \
    ssize_t name arguments { DECIDE(ssize_t, verdict_on("read", READ, descriptor), REAL(name) values, 0); }
READING(read, (int descriptor, void *into, size_t length), (descriptor, into, length))
READING(pread, (int descriptor, void *into, size_t length, off_t offset), (descriptor, into, length, offset))
READING(pread64, (int descriptor, void *into, size_t length, off_t offset), (descriptor, into, length, offset))

#define BY_DESCRIPTOR(name, classes, arguments, values) \
    int name arguments { DECIDE(int, verdict_on(#name, classes, descriptor), REAL(name) values, 0); }
#define BY_PATH(name, told, classes, directory, arguments, values) \
    int name arguments { DECIDE(int, verdict_at(told, classes, directory, path), REAL(name) values, 0); }
#define BETWEEN(name, told, from, to, arguments, values) \
    int name arguments { DECIDE(int, verdict_between(told, CHANGE | GROW, from, path, to, other), REAL(name) values, 0); }

BY_DESCRIPTOR(fsync, CHANGE | GROW, (int descriptor), (descriptor))
BY_DESCRIPTOR(fdatasync, CHANGE | GROW, (int descriptor), (descriptor))
BY_DESCRIPTOR(ftruncate, CHANGE | GROW, (int descriptor, off_t length), (descriptor, length))
BY_DESCRIPTOR(ftruncate64, CHANGE | GROW, (int descriptor, off_t length), (descriptor, length))
BY_PATH(truncate, "truncate", CHANGE | GROW, AT_FDCWD, (const char *path, off_t length), (path, length))
BY_PATH(truncate64, "truncate", CHANGE | GROW, AT_FDCWD, (const char *path, off_t length), (path, length))
BY_PATH(mkdir, "mkdir", CHANGE | GROW, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
BY_PATH(mkdirat, "mkdir", CHANGE | GROW, directory, (int directory, const char *path, mode_t mode), (directory, path, mode))
BY_PATH(rmdir, "unlink", CHANGE, AT_FDCWD, (const char *path), (path))
BY_PATH(unlink, "unlink", CHANGE, AT_FDCWD, (const char *path), (path))
BY_PATH(unlinkat, "unlink", CHANGE, directory, (int directory, const char *path, int flags), (directory, path, flags))
BETWEEN(link, "link", AT_FDCWD, AT_FDCWD, (const char *path, const char *other), (path, other))
BETWEEN(linkat, "link", from, to, (int from, const char *path, int to, const char *other, int flags), (from, path, to, other, flags))
BETWEEN(rename, "rename", AT_FDCWD, AT_FDCWD, (const char *path, const char *other), (path, other))
BETWEEN(renameat, "rename", from, to, (int from, const char *path, int to, const char *other), (from, path, to, other))

int renameat2(int from, const char *path, int to, const char *other, unsigned flags) {
    if (armed && no_exchange && flags & RENAME_EXCHANGE) return errno = EINVAL, -1;
    DECIDE(int, verdict_between(flags & RENAME_EXCHANGE ? "exchange" : "rename", CHANGE | GROW, from, path, to, other),
           (int)syscall(SYS_renameat2, from, path, to, other, flags), 0);
}
