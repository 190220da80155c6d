/* Preloaded: lets the n-th call of a kind fail on files below one folder. Counts those calls. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OPEN, READ, WRITE, FSYNC, RENAME, UNLINK, MKDIR, MMAP, TRUNCATE, KINDS };

static char below[PATH_MAX];
static size_t below_length;
static int chosen = -1, with_errno;
static long at;          /* the call that fails, 1 the first; 0 none */
static int from_then_on; /* so do all after it */
static size_t most;      /* bytes that one read or write moves at most; 0 is no limit */
static atomic_long calls[KINDS];

/* The folder, the kind and which of its calls fails; an empty folder switches everything off. */
void
soak_fault(const char *folder, int kind, long n, int code, int sticky, long bytes)
{
    below_length = 0;
    for (int i = 0; i < KINDS; i++)
        atomic_store(&calls[i], 0);
    chosen = kind;
    at = n;
    with_errno = code;
    from_then_on = sticky;
    most = (size_t)bytes;
    snprintf(below, sizeof below, "%s", folder);
    below_length = strlen(below);
}

long
soak_calls(int kind)
{
    return atomic_load(&calls[kind]);
}

static int
is_below(const char *path)
{
    return below_length > 0 && strncmp(path, below, below_length) == 0 &&
           (path[below_length] == '/' || path[below_length] == '\0');
}

static int
path_is_below(int folder, const char *path)
{
    char whole[PATH_MAX], link[64];
    ssize_t n;

    if (below_length == 0 || path == NULL)
        return 0;
    if (path[0] == '/' || folder == AT_FDCWD)
        return is_below(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    n = readlink(link, whole, sizeof whole - 1);
    if (n < 0)
        return 0;
    whole[n] = '\0';
    return is_below(whole);
}

/* 1 if this call of `kind` must fail; errno is set. */
static int
fails(int kind, int is_ours)
{
    long n;

    if (!is_ours)
        return 0;
    n = atomic_fetch_add(&calls[kind], 1) + 1;
    if (kind != chosen || at == 0 || (from_then_on ? n < at : n != at))
        return 0;
    errno = with_errno;
    return 1;
}

static int
fd_is_ours(int fd)
{
    return path_is_below(fd, "");
}

#define REAL(name, type) \
    static type real;    \
    if (real == NULL)    \
    real = (type)dlsym(RTLD_NEXT, name)

typedef int (*open_type)(const char *, int, ...);
typedef int (*openat_type)(int, const char *, int, ...);
typedef ssize_t (*read_type)(int, void *, size_t);
typedef ssize_t (*pread_type)(int, void *, size_t, off_t);
typedef ssize_t (*write_type)(int, const void *, size_t);
typedef ssize_t (*pwrite_type)(int, const void *, size_t, off_t);
typedef int (*fd_type)(int);
typedef int (*two_type)(const char *, const char *);
typedef int (*one_type)(const char *);
typedef int (*unlinkat_type)(int, const char *, int);
typedef int (*mkdir_type)(const char *, mode_t);
typedef void *(*mmap_type)(void *, size_t, int, int, int, off_t);
typedef int (*truncate_type)(int, off_t);
typedef int (*allocate_type)(int, off_t, off_t);

#define OPEN_LIKE(name)                                 \
    int name(const char *path, int flags, ...)          \
    {                                                   \
        mode_t mode = 0;                                \
        va_list rest;                                   \
        REAL(#name, open_type);                         \
        va_start(rest, flags);                          \
        if (flags & (O_CREAT | O_TMPFILE))              \
            mode = va_arg(rest, mode_t);                \
        va_end(rest);                                   \
        if (fails(OPEN, path_is_below(AT_FDCWD, path))) \
            return -1;                                  \
        return real(path, flags, mode);                 \
    }
OPEN_LIKE(open)
OPEN_LIKE(open64)

#define OPENAT_LIKE(name)                                  \
    int name(int folder, const char *path, int flags, ...) \
    {                                                      \
        mode_t mode = 0;                                   \
        va_list rest;                                      \
        REAL(#name, openat_type);                          \
        va_start(rest, flags);                             \
        if (flags & (O_CREAT | O_TMPFILE))                 \
            mode = va_arg(rest, mode_t);                   \
        va_end(rest);                                      \
        if (fails(OPEN, path_is_below(folder, path)))      \
            return -1;                                     \
        return real(folder, path, flags, mode);            \
    }
OPENAT_LIKE(openat)
OPENAT_LIKE(openat64)

#define CUT(n, ours) ((ours) && most > 0 && (n) > most ? most : (n))

ssize_t
read(int fd, void *to, size_t n)
{
    const int ours = fd_is_ours(fd);
    REAL("read", read_type);
    return fails(READ, ours) ? -1 : real(fd, to, CUT(n, ours));
}

#define PREAD_LIKE(name)                                                   \
    ssize_t name(int fd, void *to, size_t n, off_t where)                  \
    {                                                                      \
        const int ours = fd_is_ours(fd);                                   \
        REAL(#name, pread_type);                                           \
        return fails(READ, ours) ? -1 : real(fd, to, CUT(n, ours), where); \
    }
PREAD_LIKE(pread)
PREAD_LIKE(pread64)

ssize_t
write(int fd, const void *from, size_t n)
{
    const int ours = fd_is_ours(fd);
    REAL("write", write_type);
    return fails(WRITE, ours) ? -1 : real(fd, from, CUT(n, ours));
}

#define PWRITE_LIKE(name)                                                     \
    ssize_t name(int fd, const void *from, size_t n, off_t where)             \
    {                                                                         \
        const int ours = fd_is_ours(fd);                                      \
        REAL(#name, pwrite_type);                                             \
        return fails(WRITE, ours) ? -1 : real(fd, from, CUT(n, ours), where); \
    }
PWRITE_LIKE(pwrite)
PWRITE_LIKE(pwrite64)

int
fsync(int fd)
{
    REAL("fsync", fd_type);
    return fails(FSYNC, fd_is_ours(fd)) ? -1 : real(fd);
}

int
rename(const char *from, const char *to)
{
    REAL("rename", two_type);
    return fails(RENAME, path_is_below(AT_FDCWD, to)) ? -1 : real(from, to);
}

int
unlink(const char *path)
{
    REAL("unlink", one_type);
    return fails(UNLINK, path_is_below(AT_FDCWD, path)) ? -1 : real(path);
}

int
unlinkat(int folder, const char *path, int flags)
{
    REAL("unlinkat", unlinkat_type);
    return fails(UNLINK, path_is_below(folder, path)) ? -1 : real(folder, path, flags);
}

int
mkdir(const char *path, mode_t mode)
{
    REAL("mkdir", mkdir_type);
    return fails(MKDIR, path_is_below(AT_FDCWD, path)) ? -1 : real(path, mode);
}

#define MMAP_LIKE(name)                                                              \
    void *name(void *hint, size_t n, int protection, int flags, int fd, off_t where) \
    {                                                                                \
        REAL(#name, mmap_type);                                                      \
        if (fd >= 0 && fails(MMAP, fd_is_ours(fd)))                                  \
            return MAP_FAILED;                                                       \
        return real(hint, n, protection, flags, fd, where);                          \
    }
MMAP_LIKE(mmap)
MMAP_LIKE(mmap64)

#define TRUNCATE_LIKE(name)                                        \
    int name(int fd, off_t n)                                      \
    {                                                              \
        REAL(#name, truncate_type);                                \
        return fails(TRUNCATE, fd_is_ours(fd)) ? -1 : real(fd, n); \
    }
TRUNCATE_LIKE(ftruncate)
TRUNCATE_LIKE(ftruncate64)

/* Says its error by what it returns. */
#define ALLOCATE_LIKE(name)                                                   \
    int name(int fd, off_t from, off_t n)                                     \
    {                                                                         \
        REAL(#name, allocate_type);                                           \
        return fails(WRITE, fd_is_ours(fd)) ? with_errno : real(fd, from, n); \
    }
ALLOCATE_LIKE(posix_fallocate)
ALLOCATE_LIKE(posix_fallocate64)
