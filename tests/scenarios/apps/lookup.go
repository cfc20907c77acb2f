// A service that resolves a name in each request, with Go's own resolver: lookup PORT RESOLVER.
package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
)

func main() {
	resolver := &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, network, net.JoinHostPort(os.Args[2], "53"))
		},
	}
	http.HandleFunc("/", func(response http.ResponseWriter, request *http.Request) {
		addresses, err := resolver.LookupIPAddr(request.Context(), "api.shop.test.")
		if err != nil {
			http.Error(response, err.Error(), http.StatusBadGateway)
			return
		}
		fmt.Fprintln(response, addresses[0].String())
	})
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", os.Args[1]))
	if err != nil {
		panic(err)
	}
	fmt.Println("listening")
	panic(http.Serve(listener, nil))
}
