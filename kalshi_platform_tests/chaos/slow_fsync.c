/* Preloaded into the platform's processes: fsync and fdatasync take as many milliseconds longer as
   the file named by SLOW_FSYNC_MS says; no file, no delay. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

static void delay(void) {
    const char *path = getenv("SLOW_FSYNC_MS");
    char text[16] = {0};
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    if (read(fd, text, sizeof text - 1) > 0) usleep(1000 * (useconds_t)atoi(text));
    close(fd);
}

int fsync(int fd) {
    delay();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}

int fdatasync(int fd) {
    delay();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}
