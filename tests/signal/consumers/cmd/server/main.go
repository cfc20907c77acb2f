// A gRPC server that computes for each call, one call at a time. A file holds the service time in ms.
//
//	server ADDRESS FILE
package main

import (
	"context"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

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
	for began := time.Now(); time.Since(began) < time.Duration(ms)*time.Millisecond; {
	}
	return &pb.SimpleResponse{}, nil
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
