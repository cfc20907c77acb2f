package page

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"
)

// mapFile maps what the path names now; it returns old if that is still the same file.
func mapFile(path string, old *mapping) *mapping {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // never hang on a FIFO
	if err != nil {
		return nothing
	}
	defer file.Close()
	info, err := file.Stat()
	// Memory mapped beyond the end of a file is a SIGBUS to whoever reads it.
	if err != nil || !info.Mode().IsRegular() || info.Size() < pageBytes {
		return nothing
	}
	if known, ok := old.file.(os.FileInfo); ok && os.SameFile(known, info) {
		return old
	}
	mapped, err := syscall.Mmap(int(file.Fd()), 0, pageBytes, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		return nothing
	}
	// As large as the mapping, and aligned as only a page can be.
	m := &mapping{words: (*words)(unsafe.Pointer(&mapped[0])), file: info}
	runtime.SetFinalizer(m, func(*mapping) { _ = syscall.Munmap(mapped) })
	return m
}

// bootClock is CLOCK_BOOTTIME in nanoseconds. The standard library does not offer it, so it costs a system call; it is
// read only when the page has changed.
func bootClock() uint64 {
	const clockBoottime = 7
	var t syscall.Timespec
	_, _, failed := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptr(unsafe.Pointer(&t)), 0)
	if failed != 0 {
		return 0
	}
	return uint64(t.Nano())
}
