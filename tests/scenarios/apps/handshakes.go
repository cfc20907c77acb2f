// Clients that connect with TLS and ask once: handshakes ADDRESS PER-SECOND. They resume the session of an earlier connection,
// which spares the server its signature. After SIGUSR1 none of them does, after SIGUSR2 all do again.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

var full atomic.Bool

func call(address string, sessions tls.ClientSessionCache) {
	config := &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}
	if !full.Load() {
		config.ClientSessionCache = sessions
	}
	connection, err := tls.DialWithDialer(&net.Dialer{Timeout: time.Minute}, "tcp", address, config)
	if err != nil {
		return
	}
	defer connection.Close()
	fmt.Fprint(connection, "GET / HTTP/1.0\r\n\r\n")
	io.Copy(io.Discard, connection)
}

func main() {
	perSecond, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() {
		for received := range signals {
			full.Store(received == syscall.SIGUSR1)
		}
	}()
	sessions := tls.NewLRUClientSessionCache(1)
	call(os.Args[1], sessions)
	fmt.Println("ready")
	slots := make(chan struct{}, 1500)
	for range time.Tick(time.Second / time.Duration(perSecond)) {
		slots <- struct{}{}
		go func() {
			call(os.Args[1], sessions)
			<-slots
		}()
	}
}
