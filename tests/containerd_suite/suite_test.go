// Package suite runs containerd's own tests of a snapshotter against one that listens on a socket already.
//
// tests/testbed/conformance.py builds this with Debian's packages of containerd 1.6 and of Go, without modules, and says by
// environment what to test: AFS_SUITE_SOCKET is the socket, AFS_SUITE_SNAPSHOTTER the name that requests carry.
package suite

import (
	"context"
	"math/rand"
	"os"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

// The suite knows some snapshotters by name and expects of any other that it can rename a directory of a lower layer, which
// overlayfs refuses with EXDEV by default. Writable layers of afs are plain overlayfs.
const kind = "overlayfs"

func TestProxy(t *testing.T) {
	// Snapshots' names are random numbers, the same in every process unless there is a seed (before Go 1.20). They would meet
	// those of an earlier process: snapshots outlive both it and the snapshotter.
	rand.Seed(time.Now().UnixNano())
	// Cases run in parallel, and all of them after SnapshotterSuite has returned; so each has a connection of its own, and
	// one snapshotter serves all of them, as in life. The directory that a case offers stays unused.
	testsuite.SnapshotterSuite(t, kind, func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
		connection, err := grpc.Dial("unix://"+os.Getenv("AFS_SUITE_SOCKET"), grpc.WithInsecure())
		if err != nil {
			return nil, nil, err
		}
		client := snapshotsapi.NewSnapshotsClient(connection)
		return proxy.NewSnapshotter(client, os.Getenv("AFS_SUITE_SNAPSHOTTER")), connection.Close, nil
	})
}
