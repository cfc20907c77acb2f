// A net/http service with the middleware of deploy/readers/go/examples/nethttp. It takes every request immediately, but works on
// only WORKERS of them for MS milliseconds each, as with a pool of connections to a database.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"tailback.dev/page"
)

type connection struct{}

func withConnection(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connection{}, c)
}

func backpressure(tailback *page.Page, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, _ := r.Context().Value(connection{}).(net.Conn); !tailback.ShouldAdmitFrom(c) {
			w.Header().Set("Retry-After", tailback.Pressure().RetryAfterHeader())
			http.Error(w, "too busy, come again", http.StatusServiceUnavailable)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func main() {
	if len(os.Args) != 5 {
		log.Fatal("usage: nethttp PORT PAGE WORKERS MS")
	}
	workers, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	ms, err := strconv.Atoi(os.Args[4])
	if err != nil {
		log.Fatal(err)
	}
	pool := make(chan struct{}, workers)
	work := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		pool <- struct{}{}
		time.Sleep(time.Duration(ms) * time.Millisecond)
		<-pool
		fmt.Fprintln(w, "done")
	})
	server := http.Server{
		Addr:        "127.0.0.1:" + os.Args[1],
		Handler:     backpressure(page.Open(os.Args[2]), work),
		ConnContext: withConnection,
	}
	log.Fatal(server.ListenAndServe())
}
