// Command etcd is the etcd server for the tests, built from source: `go install` refuses etcd's own module, for that
// one replaces others. `cargo xtask test` puts it into target/tools.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
