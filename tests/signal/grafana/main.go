// Reads a dashboard from standard input with the types that Grafana generates from its schema, and reports every
// field that they do not have or that has a wrong type.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/statetimeline"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

func main() {
	// The kinds of panels and queries that the dashboard has; the fields of any other are not checked.
	runtime := cog.NewRuntime()
	runtime.RegisterPanelcfgVariant(stat.VariantConfig())
	runtime.RegisterPanelcfgVariant(statetimeline.VariantConfig())
	runtime.RegisterPanelcfgVariant(table.VariantConfig())
	runtime.RegisterPanelcfgVariant(timeseries.VariantConfig())
	runtime.RegisterDataqueryVariant(prometheus.VariantConfig())

	text, err := io.ReadAll(os.Stdin)
	check(err)
	var found dashboard.Dashboard
	check(found.UnmarshalJSONStrict(text))
	check(found.Validate())
	fmt.Println("valid:", *found.Title)
}

func check(err error) {
	// Some of the generated functions return an empty list of errors instead of nil.
	var list cog.BuildErrors
	if errors.As(err, &list) && len(list) == 0 {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
