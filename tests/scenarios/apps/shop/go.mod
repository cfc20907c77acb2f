// A service with a pool of connections to PostgreSQL, of which some leak.
module tailback.dev/tests/shop

go 1.21

require github.com/lib/pq v1.10.9
