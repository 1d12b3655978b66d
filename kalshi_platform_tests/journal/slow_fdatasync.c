/* Preloaded, it makes every fdatasync take SLOW_FDATASYNC_US microseconds longer, as a slow disk does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    const char *us = getenv("SLOW_FDATASYNC_US");
    if (us) usleep((useconds_t)atoi(us));
    return real(fd);
}
