//go:build !386 && !s390x

package page

import (
	"syscall"
	"time"
	"unsafe"
)

// waited reads tcpi_last_data_recv of struct tcp_info, which is in milliseconds.
func waited(connection syscall.Conn) time.Duration {
	const tcpInfo, lastDataRecv = 11, 13
	raw, err := connection.SyscallConn()
	if err != nil {
		return Unknown
	}
	var info [lastDataRecv + 1]uint32
	length := uint32(unsafe.Sizeof(info))
	var failed syscall.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, failed = syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, fd, syscall.IPPROTO_TCP, tcpInfo,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&length)), 0)
	})
	if err != nil || failed != 0 || length != uint32(unsafe.Sizeof(info)) {
		return Unknown
	}
	return time.Duration(info[lastDataRecv]) * time.Millisecond
}
