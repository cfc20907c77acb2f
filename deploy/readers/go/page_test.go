package page

import (
	"os"
	"testing"
)

// TAILBACK_PAGE=/run/tailback/shop/page go test -bench . (without it: what asking costs where there is no page)
func BenchmarkAdmit(b *testing.B) {
	p := Open(os.Getenv("TAILBACK_PAGE"))
	for i := 0; i < b.N; i++ {
		p.Admit()
	}
}
