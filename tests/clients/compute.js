// Scores one image: node compute.js SOCKET IMAGE
'use strict'

const net = require('node:net')

const [socket, path] = process.argv.slice(2)
const connection = net.createConnection(socket)
let received = ''

connection.setEncoding('utf8')
connection.on('data', (data) => {
  received += data
  if (!received.endsWith('\n')) return
  const reply = JSON.parse(received)
  connection.end()
  if (reply.error) {
    console.error(reply.error.message)
    process.exitCode = 1
  } else {
    console.log(reply.scores.map((score) => score.toFixed(6)).join(','))
  }
})
connection.write(JSON.stringify({ path }) + '\n')
