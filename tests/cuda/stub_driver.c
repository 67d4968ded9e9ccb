/* libcuda.so.1 as far as it is used, on host memory, all of it done at once.

Compiled with -DCUDA_H=1 it is checked against cuda.h itself. STUB_FOLDER holds what processes share. STUB_FAIL=NAME:NUMBER
makes a call fail, STUB_CRASH=NAME kills the process in it, STUB_HANG=NAME never returns. STUB_DEVICES: how many, else 1. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef CUDA_H
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;
typedef struct { char reserved[64]; } CUipcEventHandle;
#endif

#define MOST 256
static char primary, retained;
static __thread void *current;
static struct { uintptr_t address; size_t nbytes; char path[64]; int kind; } taken[MOST];
enum { FREE, DEVICE, OPENED, HOST, REGISTERED, STREAM, EVENT };
static int n_made;

static int injected(const char *name) {
    const char *fails = getenv("STUB_FAIL"), *crashes = getenv("STUB_CRASH"), *hangs = getenv("STUB_HANG");
    size_t n = strlen(name);
    if (crashes && !strcmp(crashes, name)) abort();
    while (hangs && !strcmp(hangs, name)) sleep(1);
    return fails && !strncmp(fails, name, n) && fails[n] == ':' ? atoi(fails + n + 1) : 0;
}
#define BEGIN int wrong = injected(__func__); if (wrong) return wrong
#define IN_CONTEXT BEGIN; if (!retained || current != &primary) return 201

static int take(uintptr_t address, size_t nbytes, int kind, const char *path) {
    for (int n = 0; n < MOST; n++)
        if (taken[n].kind == FREE) {
            taken[n].address = address, taken[n].nbytes = nbytes, taken[n].kind = kind;
            strcpy(taken[n].path, path);
            return 0;
        }
    return 2;
}
static int find(uintptr_t address, int kind) {
    for (int n = 0; n < MOST; n++)
        if (taken[n].kind == kind && taken[n].address == address) return n;
    return -1;
}
static int drop(uintptr_t address, int kind, int otherwise) {
    int n = find(address, kind);
    if (n < 0) return otherwise;
    if (kind == DEVICE || kind == OPENED || kind == HOST) munmap((void *)address, taken[n].nbytes);
    if (kind == DEVICE) unlink(taken[n].path);
    taken[n].kind = FREE;
    return 0;
}
static void *map(const char *path, size_t *nbytes) {
    char whole[512];
    struct stat found;
    snprintf(whole, sizeof whole, "%s", path);
    int fd = open(whole, O_RDWR | (*nbytes ? O_CREAT : 0), 0600);
    if (fd < 0) return NULL;
    if (*nbytes && ftruncate(fd, *nbytes)) { close(fd); return NULL; }
    fstat(fd, &found);
    *nbytes = found.st_size;
    void *address = mmap(NULL, *nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return address == MAP_FAILED ? NULL : address;
}
static int is_device(CUdeviceptr address, size_t nbytes) {
    for (int n = 0; n < MOST; n++)
        if ((taken[n].kind == DEVICE || taken[n].kind == OPENED) && taken[n].address <= address &&
            address + nbytes <= taken[n].address + taken[n].nbytes) return 1;
    return 0;
}

/* Test's own: what is left. */
int stub_n_taken(void) {
    int count = 0;
    for (int n = 0; n < MOST; n++) count += taken[n].kind != FREE;
    return count;
}
size_t stub_nbytes(uintptr_t address) {
    for (int n = 0; n < MOST; n++)
        if (taken[n].kind != FREE && taken[n].address == address) return taken[n].nbytes;
    return 0;
}
int stub_is_retained(void) { return retained; }

CUresult cuInit(unsigned int flags) { BEGIN; return flags ? 1 : 0; }
CUresult cuDriverGetVersion(int *version) { BEGIN; *version = 13000; return 0; }
CUresult cuGetErrorName(CUresult error, const char **text) {
    switch ((int)error) {
    case 1: *text = "CUDA_ERROR_INVALID_VALUE"; return 0;
    case 2: *text = "CUDA_ERROR_OUT_OF_MEMORY"; return 0;
    case 100: *text = "CUDA_ERROR_NO_DEVICE"; return 0;
    case 201: *text = "CUDA_ERROR_INVALID_CONTEXT"; return 0;
    case 719: *text = "CUDA_ERROR_LAUNCH_FAILED"; return 0;
    case 803: *text = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; return 0;
    }
    *text = NULL;
    return 1;
}
CUresult cuDeviceGetCount(int *count) {
    BEGIN;
    *count = getenv("STUB_DEVICES") ? atoi(getenv("STUB_DEVICES")) : 1;
    return 0;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) { BEGIN; *device = ordinal; return 0; }
CUresult cuDeviceGetName(char *name, int nbytes, CUdevice device) {
    BEGIN;
    snprintf(name, nbytes, "Stub %d", device);
    return 0;
}
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    BEGIN;
    for (int n = 0; n < 16; n++) uuid->bytes[n] = 240 + n;
    return 0;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    BEGIN;
    *value = (int)attribute == 75 ? 9 : (int)attribute == 76 || (int)attribute == 100 ? 0 : 1;
    return 0;
}
CUresult cuDeviceGetPCIBusId(char *text, int nbytes, CUdevice device) {
    BEGIN;
    snprintf(text, nbytes, "ABCD:1B:00.0");
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    BEGIN;
    retained++;
    *context = (CUcontext)&primary;
    return 0;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { BEGIN; retained--; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { BEGIN; *context = current; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { BEGIN; current = context; return 0; }

CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    IN_CONTEXT;
    *free = (size_t)79 << 30, *total = (size_t)80 << 30;
    return 0;
}
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t nbytes) {
    IN_CONTEXT;
    char path[64];
    if (!nbytes) return 1;
    snprintf(path, sizeof path, "%s/%d-%d", getenv("STUB_FOLDER"), getpid(), n_made++);
    void *made = map(path, &nbytes);
    if (!made) return 2;
    *address = (CUdeviceptr)made;
    return take((uintptr_t)made, nbytes, DEVICE, path);
}
CUresult cuMemFree_v2(CUdeviceptr address) { IN_CONTEXT; return drop(address, DEVICE, 1); }
CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *nbytes, CUdeviceptr address) {
    IN_CONTEXT;
    for (int n = 0; n < MOST; n++)
        if ((taken[n].kind == DEVICE || taken[n].kind == OPENED) && taken[n].address <= address &&
            address < taken[n].address + taken[n].nbytes) {
            *base = taken[n].address, *nbytes = taken[n].nbytes;
            return 0;
        }
    return 1;
}
CUresult cuMemHostRegister_v2(void *address, size_t nbytes, unsigned int flags) {
    IN_CONTEXT;
    if ((uintptr_t)address % 4096 || !nbytes || flags & ~0xfu) return 1;
    return find((uintptr_t)address, REGISTERED) >= 0 ? 712 : take((uintptr_t)address, nbytes, REGISTERED, "");
}
CUresult cuMemHostUnregister(void *address) { IN_CONTEXT; return drop((uintptr_t)address, REGISTERED, 713); }
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *found, void *address, unsigned int flags) {
    IN_CONTEXT;
    *found = (CUdeviceptr)(uintptr_t)address;
    return flags || find((uintptr_t)address, REGISTERED) < 0 ? 1 : 0;
}
CUresult cuMemHostAlloc(void **address, size_t nbytes, unsigned int flags) {
    IN_CONTEXT;
    *address = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return flags != 3 || *address == MAP_FAILED ? 2 : take((uintptr_t)*address, nbytes, HOST, "");
}
CUresult cuMemFreeHost(void *address) { IN_CONTEXT; return drop((uintptr_t)address, HOST, 1); }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t nbytes, CUstream stream) {
    IN_CONTEXT;
    if (!is_device(to, nbytes) || (stream && find((uintptr_t)stream, STREAM) < 0)) return 1;
    memcpy((void *)to, from, nbytes);
    return 0;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t nbytes, CUstream stream) {
    IN_CONTEXT;
    if (!is_device(from, nbytes) || (stream && find((uintptr_t)stream, STREAM) < 0)) return 1;
    memcpy(to, (void *)from, nbytes);
    return 0;
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    IN_CONTEXT;
    *stream = (CUstream)(uintptr_t)(0x7f0000000000 + 16 * n_made++);
    return flags == 1 ? take((uintptr_t)*stream, 0, STREAM, "") : 1;
}
CUresult cuStreamDestroy_v2(CUstream stream) { IN_CONTEXT; return drop((uintptr_t)stream, STREAM, 400); }
CUresult cuStreamSynchronize(CUstream stream) {
    IN_CONTEXT;
    return stream && find((uintptr_t)stream, STREAM) < 0 ? 400 : 0;
}
CUresult cuStreamQuery(CUstream stream) {
    static int n_asked;
    IN_CONTEXT;
    if (stream && find((uintptr_t)stream, STREAM) < 0) return 400;
    return n_asked++ % 2 ? 0 : 600;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
    IN_CONTEXT;
    return flags || find((uintptr_t)event, EVENT) < 0 ? 400 : 0;
}
CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    IN_CONTEXT;
    *event = (CUevent)(uintptr_t)(0x7e0000000000 + 16 * n_made++);
    return flags == 6 ? take((uintptr_t)*event, 0, EVENT, "") : 1;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    IN_CONTEXT;
    return find((uintptr_t)event, EVENT) < 0 || (stream && find((uintptr_t)stream, STREAM) < 0) ? 400 : 0;
}
CUresult cuEventQuery(CUevent event) { IN_CONTEXT; return find((uintptr_t)event, EVENT) < 0 ? 400 : 0; }
CUresult cuEventDestroy_v2(CUevent event) { IN_CONTEXT; return drop((uintptr_t)event, EVENT, 400); }

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    IN_CONTEXT;
    int n = find(address, DEVICE);
    if (n < 0) return 1;
    memset(handle, 0, sizeof *handle);
    memcpy(handle->reserved, taken[n].path, sizeof handle->reserved);
    return 0;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
    IN_CONTEXT;
    size_t nbytes = 0;
    char path[65] = {0};
    memcpy(path, handle.reserved, sizeof handle.reserved);
    void *found = flags == 1 ? map(path, &nbytes) : NULL;
    if (!found) return 1;
    *address = (CUdeviceptr)found;
    path[63] = 0;
    return take((uintptr_t)found, nbytes, OPENED, path);
}
CUresult cuIpcCloseMemHandle(CUdeviceptr address) { IN_CONTEXT; return drop(address, OPENED, 1); }
CUresult cuIpcGetEventHandle(CUipcEventHandle *handle, CUevent event) {
    IN_CONTEXT;
    for (int n = 0; n < 64; n++) handle->reserved[n] = n;
    return find((uintptr_t)event, EVENT) < 0 ? 400 : 0;
}
CUresult cuIpcOpenEventHandle(CUevent *event, CUipcEventHandle handle) {
    IN_CONTEXT;
    for (int n = 0; n < 64; n++) if (handle.reserved[n] != n) return 1;
    *event = (CUevent)(uintptr_t)(0x7e0000000000 + 16 * n_made++);
    return take((uintptr_t)*event, 0, EVENT, "");
}
