// Fails system calls on files below one folder, for a process that is started with this library before all others.
//
//   FAULT_DIR      the folder, absolute
//   FAULT_ERRNO    the error: 5 (EIO), 24 (EMFILE) or 28 (ENOSPC); says which calls can fail
//   FAULT_AT       the first call that fails, counted from 1 over those that can; 0: none
//   FAULT_STAYS    1: all later ones fail too, until the file FAULT_LOG.healed is there
//   FAULT_SPACE    the folder may grow by so many bytes; 0: by any. What is removed or cut off is given back
//   FAULT_LOG      file for the name and the path of each call that failed, and for the count at the end
//
// Before a write fails for lack of space, half of it is done, as a full disk does it.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *folder, *log_path;
static char healed_path[PATH_MAX];
static int error_number, fault_at, stays, count, short_write_done;
static long long space, used;

static void begin(void) __attribute__((constructor));
static void begin(void) {
    const char *number;
    folder = getenv("FAULT_DIR");
    log_path = getenv("FAULT_LOG");
    if (folder == NULL || log_path == NULL) {
        folder = NULL;
        return;
    }
    snprintf(healed_path, sizeof healed_path, "%s.healed", log_path);
    error_number = (number = getenv("FAULT_ERRNO")) ? atoi(number) : EIO;
    fault_at = (number = getenv("FAULT_AT")) ? atoi(number) : 0;
    stays = (number = getenv("FAULT_STAYS")) ? atoi(number) : 0;
    space = (number = getenv("FAULT_SPACE")) ? atoll(number) : 0;
}

static void note(const char *name, const char *path) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", name, path);
    long fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd >= 0) {
        (void)!syscall(SYS_write, fd, line, length);
        syscall(SYS_close, fd);
    }
}

static void end(void) __attribute__((destructor));
static void end(void) {
    char number[32];
    snprintf(number, sizeof number, "%d", count);
    if (folder != NULL) note("count", number);
}

enum kind { OPENS, CREATES, WRITES, CHANGES };

static int can_fail(enum kind kind) {
    switch (error_number) {
    case EMFILE: return kind == OPENS || kind == CREATES;
    case ENOSPC: return kind == CREATES || kind == WRITES;
    default: return 1;
    }
}

static int is_below(const char *path) {
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

// Whether this call fails; sets errno.
static int strikes(enum kind kind, const char *name, const char *path) {
    if (folder == NULL || !is_below(path) || !can_fail(kind)) return 0;
    int number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (fault_at == 0 || number < fault_at || (number > fault_at && !stays)) return 0;
    if (stays && syscall(SYS_faccessat, AT_FDCWD, healed_path, F_OK) == 0) return 0;
    note(name, path);
    errno = error_number;
    return 1;
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return 1;
}

static int strikes_fd(enum kind kind, const char *name, int fd) {
    char path[PATH_MAX];
    return folder != NULL && path_of(fd, path) && strikes(kind, name, path);
}

// How many of the bytes of a write there is space for.
static size_t fitting(int fd, off64_t offset, size_t length) {
    char path[PATH_MAX];
    struct stat now;
    if (folder == NULL || space == 0 || !path_of(fd, path) || !is_below(path) || fstat(fd, &now) != 0) return length;
    long long growth = offset + (long long)length - now.st_size;
    if (growth <= 0) return length;
    long long left = space - __atomic_load_n(&used, __ATOMIC_SEQ_CST);
    long long taken = growth <= left ? growth : left > 0 ? left : 0;
    __atomic_add_fetch(&used, taken, __ATOMIC_SEQ_CST);
    long long fits = (long long)length - (growth - taken);
    return fits > 0 ? fits : 0;
}

// A relative path under a folder that is open counts by that folder.
static int strikes_at(enum kind kind, const char *name, int fd, const char *path) {
    return path[0] == '/' || fd == AT_FDCWD ? strikes(kind, name, path) : strikes_fd(kind, name, fd);
}

static int open_with(const char *name, int fd, const char *path, int flags, mode_t mode) {
    if (strikes_at(flags & O_CREAT ? CREATES : OPENS, name, fd, path)) return -1;
    return syscall(SYS_openat, fd, path, flags, mode);
}

#define OPEN(name, ...)                          \
    mode_t mode = 0;                             \
    if (flags & (O_CREAT | __O_TMPFILE)) {       \
        va_list rest;                            \
        va_start(rest, flags);                   \
        mode = va_arg(rest, mode_t);             \
        va_end(rest);                            \
    }                                            \
    return open_with(name, __VA_ARGS__, flags, mode)

int open(const char *path, int flags, ...) { OPEN("open", AT_FDCWD, path); }
int open64(const char *path, int flags, ...) { OPEN("open", AT_FDCWD, path); }
int openat(int fd, const char *path, int flags, ...) { OPEN("openat", fd, path); }
int openat64(int fd, const char *path, int flags, ...) { OPEN("openat", fd, path); }

DIR *opendir(const char *path) {
    DIR *(*real)(const char *) = (DIR * (*)(const char *)) dlsym(RTLD_NEXT, "opendir");
    return strikes(OPENS, "opendir", path) ? NULL : real(path);
}

// Half of the bytes are written before space runs out; the write that follows fails.
static size_t before_full(size_t length) {
    if (error_number != ENOSPC || length < 2 || __atomic_exchange_n(&short_write_done, 1, __ATOMIC_SEQ_CST)) return 0;
    return length / 2;
}

static ssize_t write_with(const char *name, int fd, const void *bytes, size_t length, off64_t offset, int at) {
    if (strikes_fd(WRITES, name, fd)) {
        if ((length = before_full(length)) == 0) return -1;
        if (!stays) fault_at = count + 1;
    }
    size_t fits = fitting(fd, offset, length);
    if (fits == 0 && length > 0) {
        errno = ENOSPC;
        return -1;
    }
    return at ? syscall(SYS_pwrite64, fd, bytes, fits, offset) : syscall(SYS_write, fd, bytes, fits);
}

ssize_t write(int fd, const void *bytes, size_t length) {
    off64_t offset = folder == NULL || space == 0 ? 0 : syscall(SYS_lseek, fd, 0, SEEK_CUR);
    return write_with("write", fd, bytes, length, offset < 0 ? 0 : offset, 0);
}

static ssize_t write_at(int fd, const void *bytes, size_t length, off64_t offset) {
    return write_with("pwrite", fd, bytes, length, offset, 1);
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) { return write_at(fd, bytes, length, offset); }
ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) {
    return write_at(fd, bytes, length, offset);
}

int fsync(int fd) { return strikes_fd(CHANGES, "fsync", fd) ? -1 : syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return strikes_fd(CHANGES, "fdatasync", fd) ? -1 : syscall(SYS_fdatasync, fd); }

int sync_file_range(int fd, off64_t offset, off64_t length, unsigned flags) {
    if (strikes_fd(CHANGES, "sync_file_range", fd)) return -1;
    return syscall(SYS_sync_file_range, fd, offset, length, flags);
}

static int truncate_to(int fd, off64_t length) {
    char path[PATH_MAX];
    struct stat now;
    if (strikes_fd(CHANGES, "ftruncate", fd)) return -1;
    if (folder != NULL && space != 0 && path_of(fd, path) && is_below(path) && fstat(fd, &now) == 0) {
        __atomic_add_fetch(&used, length - now.st_size, __ATOMIC_SEQ_CST);
    }
    return syscall(SYS_ftruncate, fd, length);
}

int ftruncate(int fd, off_t length) { return truncate_to(fd, length); }
int ftruncate64(int fd, off64_t length) { return truncate_to(fd, length); }

int rename(const char *from, const char *to) {
    if (strikes(CHANGES, "rename", from)) return -1;
    return syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
}

int unlink(const char *path) {
    struct stat now;
    if (strikes(CHANGES, "unlink", path)) return -1;
    int known = folder != NULL && space != 0 && is_below(path) && stat(path, &now) == 0;
    int result = syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (known && result == 0) __atomic_sub_fetch(&used, (long long)now.st_size, __ATOMIC_SEQ_CST);
    return result;
}
