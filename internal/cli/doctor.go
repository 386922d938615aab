package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"banger"
	"banger/internal/api"
)

func doctorCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look at what this host gives banger, and say how to mend what it lacks",
		Args:  exactly(),
		RunE: func(cmd *cobra.Command, args []string) error {
			var out api.Checks
			if err := call(api.MethodDoctor, api.None{}, nil, &out); err != nil {
				return err
			}
			failed := 0
			rows := [][]string{}
			for _, c := range out.Checks {
				if c.State == banger.CheckFail {
					failed++
				}
				rows = append(rows, []string{string(c.State), c.Name, c.Found})
				if c.Fix != "" {
					rows = append(rows, []string{"", "", "fix: " + c.Fix})
				}
			}
			var err error
			if asJSON {
				err = printJSON(out.Checks)
			} else {
				err = table(rows)
			}
			if err == nil && failed > 0 {
				err = banger.Errorf(banger.CodeUnavailable, "doctor: %s failed", plural(failed, "check"))
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON list")
	return cmd
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
