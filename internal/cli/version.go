package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"banger/internal/api"
)

func versionCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show the versions and places of banger's programs",
		Args:  exactly(),
		RunE: func(cmd *cobra.Command, args []string) error {
			var v api.Version
			if err := call(api.MethodVersion, api.None{}, nil, &v); err != nil {
				return err
			}
			if v.Version != Version {
				return fmt.Errorf("banger is %s and %s is %s: install them again together", Version, v.Daemon, v.Version)
			}
			if asJSON {
				return printJSON(v)
			}
			fmt.Printf("banger %s\n", v.Version)
			return table([][]string{{"daemon", v.Daemon}, {"agent", v.Agent}, {"state", v.State}, {"go", v.Go}})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON document")
	return cmd
}
