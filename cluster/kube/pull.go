package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"go.opentelemetry.io/otel/trace/noop"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
)

// newPullCommand pulls an image the way kubelet does, so that what is pulled ahead is what a pod then finds: containerd's
// own `ctr images pull` ignores the settings of its CRI plugin, and keeps every layer twice.
func newPullCommand() *cobra.Command {
	return &cobra.Command{
		Use:  "cri-pull ENDPOINT IMAGE",
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			ctx := context.Background()
			images, err := remote.NewRemoteImageService(ctx, args[0], 10*time.Second, noop.NewTracerProvider(), false)
			if err != nil {
				return err
			}
			id, err := images.PullImage(ctx, &runtimeapi.ImageSpec{Image: args[1]}, nil, nil)
			if err != nil {
				return err
			}
			fmt.Println(id)
			return nil
		},
	}
}
