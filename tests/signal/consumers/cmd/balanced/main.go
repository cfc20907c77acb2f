// Calls servers at a constant rate through gRPC's weighted round robin with out-of-band load reports. Prints the number of
// completed calls per server every second, as a line of JSON.
//
//	balanced PER_SECOND ADDRESS...
package main

import (
	"context"
	"encoding/json"
	"log"
	"os"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/balancer/weightedroundrobin"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

const balancer = `{"loadBalancingConfig": [{"weighted_round_robin": {
	"enableOobLoadReport": true, "oobReportingPeriod": "0.1s", "blackoutPeriod": "0s",
	"weightUpdatePeriod": "0.1s", "weightExpirationPeriod": "1s"}}]}`

func main() {
	perSecond, err := strconv.Atoi(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	servers := manual.NewBuilderWithScheme("these")
	var state resolver.State
	for _, address := range os.Args[2:] {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}})
	}
	servers.InitialState(state)
	connection, err := grpc.NewClient("these:///servers", grpc.WithResolvers(servers),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultServiceConfig(balancer))
	if err != nil {
		log.Fatal(err)
	}
	client := pb.NewTestServiceClient(connection)
	var lock sync.Mutex
	completed := map[string]int{}
	call := func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		var who peer.Peer
		_, err := client.UnaryCall(ctx, &pb.SimpleRequest{}, grpc.Peer(&who))
		lock.Lock()
		defer lock.Unlock()
		if err != nil {
			completed["error"]++
			log.Print(err)
		} else {
			completed[who.Addr.String()]++
		}
	}
	out := json.NewEncoder(os.Stdout)
	each := time.NewTicker(time.Second / time.Duration(perSecond))
	second := time.NewTicker(time.Second)
	for {
		select {
		case <-each.C:
			go call()
		case <-second.C:
			lock.Lock()
			if err := out.Encode(completed); err != nil {
				log.Fatal(err)
			}
			clear(completed)
			lock.Unlock()
		}
	}
}
