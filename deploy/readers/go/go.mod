module tailback.dev/page

go 1.21
