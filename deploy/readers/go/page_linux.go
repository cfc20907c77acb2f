package page

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"
)

// mapFile maps the file at the path; it returns old if that is still the same file.
func mapFile(path string, old *mapping) *mapping {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO must not block
	if err != nil {
		return nothing
	}
	defer file.Close()
	info, err := file.Stat()
	// Reading beyond the end of a mapped file raises SIGBUS.
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
	// The mapping is as large as the array and page-aligned.
	m := &mapping{words: (*words)(unsafe.Pointer(&mapped[0])), file: info}
	runtime.SetFinalizer(m, func(*mapping) { _ = syscall.Munmap(mapped) })
	return m
}

// bootClock is CLOCK_BOOTTIME in nanoseconds. The standard library does not provide it, so it costs a system call; it is read
// only when the page has changed.
func bootClock() uint64 {
	const clockBoottime = 7
	var t syscall.Timespec
	_, _, failed := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptr(unsafe.Pointer(&t)), 0)
	if failed != 0 {
		return 0
	}
	return uint64(t.Nano())
}
