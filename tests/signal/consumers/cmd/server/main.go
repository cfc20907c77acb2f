// A gRPC server that computes for each call, one call at a time. A file holds the CPU time of a call in ms.
//
//	server ADDRESS FILE
package main

import (
	"context"
	"log"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	pb "google.golang.org/grpc/interop/grpc_testing"
)

type server struct {
	pb.UnimplementedTestServiceServer
	file string
	one  sync.Mutex
}

func (s *server) UnaryCall(context.Context, *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	text, err := os.ReadFile(s.file)
	if err != nil {
		return nil, err
	}
	ms, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, err
	}
	s.one.Lock()
	defer s.one.Unlock()
	return &pb.SimpleResponse{}, compute(time.Duration(ms) * time.Millisecond)
}

// Uses this much CPU time, however long that takes: with a smaller quota or beside a neighbour it takes longer.
func compute(duration time.Duration) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began, err := cpuTime()
	for now := began; err == nil && now-began < duration; {
		now, err = cpuTime()
	}
	return err
}

// CPU time of this thread.
func cpuTime() (time.Duration, error) {
	var now unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now)
	return time.Duration(now.Nano()), err
}

func main() {
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterTestServiceServer(s, &server{file: os.Args[2]})
	log.Fatal(s.Serve(listener))
}
