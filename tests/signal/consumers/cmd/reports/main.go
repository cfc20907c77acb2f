// Requests ORCA load reports every millisecond with gRPC's own client.
//
//	reports ADDRESS hold STREAMS     reads one report of each stream, and never again
//	reports ADDRESS close STREAMS    cancels each stream at once
//	reports ADDRESS count STREAMS    prints how many reports one stream gets in 2 s
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	orca "github.com/cncf/xds/go/xds/service/orca/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Streams per connection: what the adapter allows.
const perConnection = 4

func main() {
	address, mode := os.Args[1], os.Args[2]
	streams, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	var client orca.OpenRcaServiceClient
	for i := range streams {
		if i%perConnection == 0 {
			// Without BDP estimation, which would enlarge the window.
			connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithInitialWindowSize(65535), grpc.WithInitialConnWindowSize(1<<20))
			if err != nil {
				log.Fatal(err)
			}
			client = orca.NewOpenRcaServiceClient(connection)
		}
		ctx, cancel := context.WithCancel(context.Background())
		if mode == "count" {
			ctx, cancel = context.WithTimeout(context.Background(), 2*time.Second)
		}
		stream, err := client.StreamCoreMetrics(ctx, &orca.OrcaLoadReportRequest{
			ReportInterval: durationpb.New(time.Millisecond),
		})
		if err != nil {
			log.Fatal(err)
		}
		switch mode {
		case "close":
			cancel()
		case "hold":
			if _, err := stream.Recv(); err != nil {
				log.Fatal(err)
			}
		case "count":
			count := 0
			for {
				if _, err := stream.Recv(); err != nil {
					break
				}
				count++
			}
			fmt.Println(count)
		}
	}
	if mode == "hold" {
		fmt.Println("held")
		select {}
	}
}
