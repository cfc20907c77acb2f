// Calls servers at a constant rate through one of gRPC's balancers: by default weighted round robin with out-of-band load
// reports. Prints the number of completed calls per server every second, as a line of JSON, and under "good" how many of
// them took at most the time of -good from when they were due.
//
//	balanced [-policy round_robin] [-good DURATION] PER_SECOND ADDRESS...
package main

import (
	"context"
	"encoding/json"
	"flag"
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

// The service config of each policy.
var policies = map[string]string{
	"round_robin": `{"loadBalancingConfig": [{"round_robin": {}}]}`,
	"weighted_round_robin": `{"loadBalancingConfig": [{"weighted_round_robin": {
		"enableOobLoadReport": true, "oobReportingPeriod": "0.1s", "blackoutPeriod": "0s",
		"weightUpdatePeriod": "0.1s", "weightExpirationPeriod": "1s"}}]}`,
}

func main() {
	policy := flag.String("policy", "weighted_round_robin", "load balancing policy")
	good := flag.Duration("good", 10*time.Second, "duration of a good call")
	flag.Parse()
	config, ok := policies[*policy]
	if !ok {
		log.Fatalf("no such policy: %s", *policy)
	}
	perSecond, err := strconv.Atoi(flag.Arg(0))
	if err != nil {
		log.Fatal(err)
	}
	servers := manual.NewBuilderWithScheme("these")
	var state resolver.State
	for _, address := range flag.Args()[1:] {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}})
	}
	servers.InitialState(state)
	connection, err := grpc.NewClient("these:///servers", grpc.WithResolvers(servers),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultServiceConfig(config))
	if err != nil {
		log.Fatal(err)
	}
	client := pb.NewTestServiceClient(connection)
	var lock sync.Mutex
	completed := map[string]int{}
	call := func(due time.Time) {
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
			if time.Since(due) <= *good {
				completed["good"]++
			}
		}
	}
	out := json.NewEncoder(os.Stdout)
	each := time.NewTicker(time.Second / time.Duration(perSecond))
	second := time.NewTicker(time.Second)
	for {
		select {
		case due := <-each.C:
			go call(due)
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
