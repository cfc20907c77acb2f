// A net/http middleware that sheds load as the page asks, around a tiny service.
//
//	go run ./examples/nethttp 8000 /run/tailback/shop/page
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"

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
	if len(os.Args) != 3 {
		log.Fatal("usage: nethttp PORT PAGE")
	}
	shop := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello") })
	server := http.Server{
		Addr:        ":" + os.Args[1],
		Handler:     backpressure(page.Open(os.Args[2]), shop),
		ConnContext: withConnection,
	}
	log.Fatal(server.ListenAndServe())
}
