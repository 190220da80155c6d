/* Preloaded: lets the n-th call of a kind fail on files below one of some folders, and counts. */
#define _GNU_SOURCE
#include <dirent.h>
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
enum { PLACES = 8, NOWHERE = -1 };

static char folders[PLACES][PATH_MAX];
static int on; /* whether calls are counted, and may fail */
static int chosen_place = NOWHERE, chosen = -1, with_errno;
static long at;          /* the call that fails, 1 the first; 0 none */
static int from_then_on; /* so do all after it */
static size_t most;      /* bytes that one read or write moves at most; 0 is no limit */

/* Of each place and kind; shared with children, so that their parent sees what they did. */
static atomic_long (*calls)[KINDS];

/* Gives a place its folder, before any child is forked; -1 where there is no memory. */
int
soak_place(int place, const char *folder)
{
    if (calls == NULL) {
        void *shared = mmap(NULL, sizeof(atomic_long[PLACES][KINDS]), PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (shared == MAP_FAILED)
            return -1;
        calls = shared;
    }
    snprintf(folders[place], sizeof folders[place], "%s", folder);
    return 0;
}

/* From now on calls are counted, anew, and this one fails, or moves few bytes, in this process. */
void
soak_fault(int place, int kind, long n, int code, int sticky, long bytes)
{
    for (int i = 0; i < PLACES; i++)
        for (int j = 0; j < KINDS; j++)
            atomic_store(&calls[i][j], 0);
    chosen_place = place;
    chosen = kind;
    at = n;
    with_errno = code;
    from_then_on = sticky;
    most = (size_t)bytes;
    on = 1;
}

/* Of the last process that was to count. */
long
soak_calls(int place, int kind)
{
    return atomic_load(&calls[place][kind]);
}

static int
place_of(const char *path)
{
    for (int i = 0; i < PLACES; i++) {
        const size_t n = strlen(folders[i]);
        if (n > 0 && strncmp(path, folders[i], n) == 0 && (path[n] == '/' || path[n] == '\0'))
            return i;
    }
    return NOWHERE;
}

static int
place_at(int folder, const char *path)
{
    char whole[PATH_MAX], link[64];
    ssize_t n;

    if (!on || path == NULL)
        return NOWHERE;
    if (path[0] == '/' || folder == AT_FDCWD)
        return place_of(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    n = readlink(link, whole, sizeof whole - 1);
    if (n < 0)
        return NOWHERE;
    whole[n] = '\0';
    return place_of(whole);
}

static int
place_of_fd(int fd)
{
    return place_at(fd, "");
}

/* 1 if this call of `kind` must fail; errno is set. */
static int
fails(int kind, int place)
{
    long n;

    if (place == NOWHERE)
        return 0;
    n = atomic_fetch_add(&calls[place][kind], 1) + 1;
    if (place != chosen_place || kind != chosen || at == 0 || (from_then_on ? n < at : n != at))
        return 0;
    errno = with_errno;
    return 1;
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
typedef DIR *(*folder_type)(const char *);

#define OPEN_LIKE(name)                            \
    int name(const char *path, int flags, ...)     \
    {                                              \
        mode_t mode = 0;                           \
        va_list rest;                              \
        REAL(#name, open_type);                    \
        va_start(rest, flags);                     \
        if (flags & (O_CREAT | O_TMPFILE))         \
            mode = va_arg(rest, mode_t);           \
        va_end(rest);                              \
        if (fails(OPEN, place_at(AT_FDCWD, path))) \
            return -1;                             \
        return real(path, flags, mode);            \
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
        if (fails(OPEN, place_at(folder, path)))           \
            return -1;                                     \
        return real(folder, path, flags, mode);            \
    }
OPENAT_LIKE(openat)
OPENAT_LIKE(openat64)

DIR *
opendir(const char *path)
{
    REAL("opendir", folder_type);
    return fails(OPEN, place_at(AT_FDCWD, path)) ? NULL : real(path);
}

#define CUT(n, place) ((place) == chosen_place && most > 0 && (n) > most ? most : (n))

ssize_t
read(int fd, void *to, size_t n)
{
    const int place = place_of_fd(fd);
    REAL("read", read_type);
    return fails(READ, place) ? -1 : real(fd, to, CUT(n, place));
}

#define PREAD_LIKE(name)                                                     \
    ssize_t name(int fd, void *to, size_t n, off_t where)                    \
    {                                                                        \
        const int place = place_of_fd(fd);                                   \
        REAL(#name, pread_type);                                             \
        return fails(READ, place) ? -1 : real(fd, to, CUT(n, place), where); \
    }
PREAD_LIKE(pread)
PREAD_LIKE(pread64)

ssize_t
write(int fd, const void *from, size_t n)
{
    const int place = place_of_fd(fd);
    REAL("write", write_type);
    return fails(WRITE, place) ? -1 : real(fd, from, CUT(n, place));
}

#define PWRITE_LIKE(name)                                                       \
    ssize_t name(int fd, const void *from, size_t n, off_t where)               \
    {                                                                           \
        const int place = place_of_fd(fd);                                      \
        REAL(#name, pwrite_type);                                               \
        return fails(WRITE, place) ? -1 : real(fd, from, CUT(n, place), where); \
    }
PWRITE_LIKE(pwrite)
PWRITE_LIKE(pwrite64)

int
fsync(int fd)
{
    REAL("fsync", fd_type);
    return fails(FSYNC, place_of_fd(fd)) ? -1 : real(fd);
}

int
rename(const char *from, const char *to)
{
    REAL("rename", two_type);
    return fails(RENAME, place_at(AT_FDCWD, to)) ? -1 : real(from, to);
}

int
unlink(const char *path)
{
    REAL("unlink", one_type);
    return fails(UNLINK, place_at(AT_FDCWD, path)) ? -1 : real(path);
}

int
unlinkat(int folder, const char *path, int flags)
{
    REAL("unlinkat", unlinkat_type);
    return fails(UNLINK, place_at(folder, path)) ? -1 : real(folder, path, flags);
}

int
mkdir(const char *path, mode_t mode)
{
    REAL("mkdir", mkdir_type);
    return fails(MKDIR, place_at(AT_FDCWD, path)) ? -1 : real(path, mode);
}

#define MMAP_LIKE(name)                                                              \
    void *name(void *hint, size_t n, int protection, int flags, int fd, off_t where) \
    {                                                                                \
        REAL(#name, mmap_type);                                                      \
        if (fd >= 0 && fails(MMAP, place_of_fd(fd)))                                 \
            return MAP_FAILED;                                                       \
        return real(hint, n, protection, flags, fd, where);                          \
    }
MMAP_LIKE(mmap)
MMAP_LIKE(mmap64)

#define TRUNCATE_LIKE(name)                                         \
    int name(int fd, off_t n)                                       \
    {                                                               \
        REAL(#name, truncate_type);                                 \
        return fails(TRUNCATE, place_of_fd(fd)) ? -1 : real(fd, n); \
    }
TRUNCATE_LIKE(ftruncate)
TRUNCATE_LIKE(ftruncate64)

/* Says its error by what it returns. */
#define ALLOCATE_LIKE(name)                                                    \
    int name(int fd, off_t from, off_t n)                                      \
    {                                                                          \
        REAL(#name, allocate_type);                                            \
        return fails(WRITE, place_of_fd(fd)) ? with_errno : real(fd, from, n); \
    }
ALLOCATE_LIKE(posix_fallocate)
ALLOCATE_LIKE(posix_fallocate64)
