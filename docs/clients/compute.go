// Scores one image by its descriptor: go run compute.go IMAGE [SOCKET]
//
// The image is opened here, so the daemon needs no permission of its own to read it. The exit
// status is 1 where the image cannot be scored, 3 where the daemon does not answer, is busy or
// late.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const timeout = 30 * time.Second

func fail(status int, code, message string) {
	// A file's name may be in it, and hold anything: it stays one line and cannot steer a terminal.
	shown := strconv.QuoteToASCII(message)
	fmt.Fprintf(os.Stderr, "%s: %s\n", code, shown[1:len(shown)-1])
	os.Exit(status)
}

func ask(socket string, image *os.File) ([]byte, error) {
	connection, err := net.DialTimeout("unix", socket, timeout)
	if err != nil {
		return nil, err
	}
	connection.SetDeadline(time.Now().Add(timeout))
	request := fmt.Sprintf("{\"timeout_ms\":%d}\n", timeout.Milliseconds())
	rights := syscall.UnixRights(int(image.Fd()))
	_, _, err = connection.(*net.UnixConn).WriteMsgUnix([]byte(request), rights, nil)
	if err != nil && !errors.Is(err, syscall.EPIPE) {
		return nil, err
	}
	// After EPIPE, too: whoever is turned away, as one too many, can still read why.
	return bufio.NewReader(connection).ReadBytes('\n')
}

func main() {
	if len(os.Args) < 2 || len(os.Args) > 3 {
		fmt.Fprintln(os.Stderr, "usage: compute IMAGE [SOCKET]")
		os.Exit(2)
	}
	socket := os.Getenv("SWIPR_SOCKET")
	if len(os.Args) == 3 {
		socket = os.Args[2]
	} else if socket == "" {
		socket = "/run/swipr/swipr.sock"
	}
	// O_NONBLOCK: a pipe without a writer would keep us waiting.
	image, err := os.OpenFile(os.Args[1], syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		fail(1, "not_found", err.Error())
	} else if errors.Is(err, os.ErrPermission) {
		fail(1, "permission_denied", err.Error())
	} else if err != nil {
		fail(1, "not_a_file", err.Error())
	}
	defer image.Close() // not before its descriptor is sent
	line, err := ask(socket, image)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		fail(3, "timeout", socket+": no answer within "+timeout.String())
	} else if err != nil {
		fail(3, "cannot_connect", err.Error())
	}

	var reply struct {
		Scores []float64
		Error  *struct {
			Code, Message string
			Retryable     bool
		}
	}
	err = json.Unmarshal(line, &reply)
	if failure := reply.Error; failure != nil && failure.Code != "" {
		if failure.Retryable || failure.Code == "timeout" {
			fail(3, failure.Code, failure.Message)
		}
		fail(1, failure.Code, failure.Message)
	} else if err != nil || failure != nil || len(reply.Scores) == 0 {
		fail(1, "bad_reply", "neither scores nor an error")
	}
	tuple := make([]string, len(reply.Scores))
	for i, score := range reply.Scores {
		tuple[i] = strconv.FormatFloat(score, 'f', 6, 64)
	}
	if _, err := fmt.Println(strings.Join(tuple, ",")); err != nil {
		fail(1, "internal", err.Error())
	}
}
