// A service whose requests share a pool of connections to PostgreSQL: shop PORT SQL-PORT POOL. /leak returns on an error path and does
// not close its rows, which keeps their connection. SIGUSR2: the rows are closed.
package main

import (
	"database/sql"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"

	_ "github.com/lib/pq"
)

var (
	lock   sync.Mutex
	leaked []*sql.Rows
)

func closeLeaked() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR2)
	for range signals {
		lock.Lock()
		for _, rows := range leaked {
			rows.Close()
		}
		leaked = nil
		lock.Unlock()
	}
}

func query(database *sql.DB, leaks bool) error {
	rows, err := database.Query("SELECT n, pg_sleep(0.01) FROM generate_series(1, 2) AS n")
	if err != nil {
		return err
	}
	if leaks {
		lock.Lock()
		leaked = append(leaked, rows)
		lock.Unlock()
		return nil
	}
	defer rows.Close()
	for rows.Next() {
	}
	return rows.Err()
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	database, err := sql.Open("postgres", "host=127.0.0.1 user=postgres sslmode=disable port="+os.Args[2])
	check(err)
	pool, err := strconv.Atoi(os.Args[3])
	check(err)
	database.SetMaxOpenConns(pool)
	database.SetMaxIdleConns(pool)
	check(database.Ping())
	go closeLeaked()
	http.HandleFunc("/", func(response http.ResponseWriter, request *http.Request) {
		if err := query(database, request.URL.Path == "/leak"); err != nil {
			http.Error(response, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(response, "ok")
	})
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", os.Args[1]))
	check(err)
	fmt.Println("listening")
	panic(http.Serve(listener, nil))
}
