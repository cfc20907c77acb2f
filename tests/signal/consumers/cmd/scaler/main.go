// Queries an external scaler with KEDA's own client and prints the responses as JSON.
//
//	scaler [-metrics] ADDRESS KEY=VALUE...
//
// The pairs are the trigger's metadata. With -metrics it calls GetMetrics only: a stream sends nothing while the load is unknown.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	pb "github.com/kedacore/keda/v2/pkg/scalers/externalscaler"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

func main() {
	onlyMetrics := flag.Bool("metrics", false, "call GetMetrics only")
	flag.Parse()
	connection, err := grpc.NewClient(flag.Arg(0), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	object := &pb.ScaledObjectRef{Name: "shop", Namespace: "default", ScalerMetadata: map[string]string{}}
	for _, pair := range flag.Args()[1:] {
		key, value, _ := strings.Cut(pair, "=")
		object.ScalerMetadata[key] = value
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client := pb.NewExternalScalerClient(connection)
	said := map[string]any{}
	note := func(key string, value any, err error) {
		if err != nil {
			value = fmt.Sprintf("%s: %s", status.Code(err), status.Convert(err).Message())
		}
		said[key] = value
	}
	metrics, err := client.GetMetrics(ctx, &pb.GetMetricsRequest{ScaledObjectRef: object, MetricName: "tailback_load"})
	note("metrics", metrics.GetMetricValues(), err)
	if !*onlyMetrics {
		active, err := client.IsActive(ctx, object)
		note("active", active.GetResult(), err)
		spec, err := client.GetMetricSpec(ctx, object)
		note("spec", spec.GetMetricSpecs(), err)
		stream, err := client.StreamIsActive(ctx, object)
		if err == nil {
			active, err = stream.Recv()
		}
		note("stream_active", active.GetResult(), err)
		specs, err := client.StreamMetricSpec(ctx, object)
		if err == nil {
			_, err = specs.Recv()
		}
		note("stream_spec", nil, err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(said); err != nil {
		log.Fatal(err)
	}
}
