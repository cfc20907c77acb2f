// A service that allocates 1 MB in each request: heap PORT MB. SIGUSR1: it also keeps MB in small objects. SIGUSR2: no longer.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
)

type node struct {
	next *node
	rest [48]byte
}

var cache *node

func listen(bytes int) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	for received := range signals {
		cache = nil
		runtime.GC()
		for kept := 0; received == syscall.SIGUSR1 && kept < bytes; kept += 64 {
			cache = &node{next: cache}
		}
	}
}

func main() {
	megabytes, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	go listen(megabytes * 1000000)
	http.HandleFunc("/", func(response http.ResponseWriter, request *http.Request) {
		var pages [][]byte
		for len(pages) < 500 {
			pages = append(pages, make([]byte, 2000))
		}
		fmt.Fprintln(response, len(pages))
	})
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", os.Args[1]))
	if err != nil {
		panic(err)
	}
	fmt.Println("listening")
	panic(http.Serve(listener, nil))
}
